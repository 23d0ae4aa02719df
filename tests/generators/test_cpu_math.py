"""Few passes over memory, and the same numbers as torch's operations, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from customized_grpo.generators.cpu import math as cpu_math

EPS = 1e-6


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


def assert_same(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *given: Tensor) -> None:
    """Values and gradients, and the values again without gradients."""
    inputs = [x.clone().requires_grad_() for x in given]
    results = [function(*inputs) for function in (ours, plain)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    wanted = random(*results[0].shape)
    gradients = [torch.autograd.grad(result, inputs, wanted) for result in results]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(ours(*given), results[1].detach(), rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_math, "_CACHED", 100)
    monkeypatch.setattr(cpu_math, "_SCORES", 100)


def test_gelu_is_the_tanh_one() -> None:
    assert_same(cpu_math.gelu, lambda x: F.gelu(x, approximate="tanh"), 4 * random(7, 33))


def test_gelu_leaves_its_input_as_it_was() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given = random(300, dtype=torch.float32).to(dtype)
        kept = given.clone()
        cpu_math.gelu(given)
        assert torch.equal(given, kept)


def rotated_by_diffusers(*tensors: Tensor, angles: Tensor, scale: float) -> Tensor:
    text, image, of_text, of_image = tensors
    normed = [
        F.rms_norm(x.unflatten(-1, (2, 8)), (8,), weight, EPS)
        for x, weight in ((text, of_text), (image, of_image))
    ]
    cos, sin = (f(angles).repeat_interleave(2, 1) for f in (torch.cos, torch.sin))
    x = torch.cat(normed, 1)
    pairs = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    single = apply_rotary_emb(x.float(), (cos.float(), sin.float()), sequence_dim=1)
    exact = x * cos[:, None] + pairs * sin[:, None]
    torch.testing.assert_close(exact.float(), single)  # diffusers itself rounds to float32
    return exact.transpose(1, 2) * scale


def test_rotated_heads_are_norm_then_rotary_positions() -> None:
    angles = random(5 + 4, 4)

    def ours(text: Tensor, image: Tensor, of_text: Tensor, of_image: Tensor) -> Tensor:
        rotation = torch.polar(torch.ones_like(angles), angles)
        return cpu_math.rotated_heads([text, image], [of_text, of_image], rotation, EPS, 0.3)

    def plain(*given: Tensor) -> Tensor:
        return rotated_by_diffusers(*given, angles=angles, scale=0.3)

    assert_same(ours, plain, random(3, 5, 16), random(3, 4, 16), random(8), random(8))


@pytest.mark.parametrize("queries", [6, 2])
def test_attention_is_attention(queries: int) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    assert_same(cpu_math.attention, plain, random(3, 2, queries, 8), *random(2, 3, 2, 6, 8))


@pytest.mark.parametrize("trained", [False, True])
def test_long_sequences_keep_no_scores(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    monkeypatch.setattr(cpu_math, "MAX_TOKENS", 5)
    monkeypatch.setattr(cpu_math, "_FUSED_TOKENS", 5)
    monkeypatch.delattr(cpu_math, "_Attention")
    q, k, v = random(3, 2, 2, 6, 8).unbind(0)
    got = cpu_math.attention(q.requires_grad_(trained), k, v)
    torch.testing.assert_close(got, (q @ k.transpose(-1, -2)).softmax(-1) @ v)


def test_under_autocast_the_scores_stay_bfloat16() -> None:
    q, k, v = random(3, 2, 2, 6, 8).bfloat16().unbind(0)
    with torch.autocast("cpu", torch.bfloat16):
        got = cpu_math.attention(q.requires_grad_(), k, v)
    assert got.dtype == torch.bfloat16
    saved = [tensor.dtype for tensor in got.grad_fn.next_functions[0][0].saved_tensors]
    assert set(saved) == {torch.bfloat16}
