"""FLUX.1's own forward pass on a CPU against diffusers', in float64."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from helpers import assert_near

from customized_grpo.generators.cpu import use_cpu_blocks

TARGETS, REFERENCES, TEXTS = 5, 4, 7
SIZES = {
    "in_channels": 8,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 6,
    "axes_dims_rope": (4, 6, 6),
}


def transformer(doubles: int, singles: int) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(num_layers=doubles, num_single_layers=singles, **SIZES)
    for parameter in model.parameters():  # norms' weights too: they start as ones
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.double()


@pytest.mark.parametrize(("doubles", "singles"), [(2, 2), (1, 1)])
@pytest.mark.parametrize("grad", [True, False])
def test_blocks_are_diffusers_blocks(doubles: int, singles: int, grad: bool) -> None:
    stock, fast = transformer(doubles, singles), transformer(doubles, singles)
    use_cpu_blocks(fast, TARGETS)
    torch.manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(3, TARGETS + REFERENCES, 8, dtype=torch.float64),
        "encoder_hidden_states": torch.randn(3, TEXTS, 12, dtype=torch.float64),
        "pooled_projections": torch.randn(3, 6, dtype=torch.float64),
        "timestep": torch.rand(3, dtype=torch.float64),
        "img_ids": torch.randint(9, (TARGETS + REFERENCES, 3)),
        "txt_ids": torch.zeros(TEXTS, 3),
        "return_dict": False,
    }
    with torch.set_grad_enabled(grad):
        wanted, got = stock(**inputs)[0][:, :TARGETS], fast(**inputs)[0]
    assert_near(got, wanted, terms=64)  # diffusers' angles are float32
    if not grad:
        return
    weight = torch.randn_like(wanted)
    gradients = [
        torch.autograd.grad((out * weight).sum(), list(model.parameters()))
        for out, model in ((got, fast), (wanted, stock))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm() + 1e-9
