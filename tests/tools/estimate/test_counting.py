"""Counts against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from customized_grpo.tools.estimate.counting import count, make_fake, on_meta, on_skeletons


def fake_linear(width: int, out: int, *, trained: bool) -> nn.Linear:
    with on_meta(torch.float32):
        layer = nn.Linear(width, out, bias=False).requires_grad_(trained)
    make_fake(layer)
    return layer


@pytest.mark.parametrize(("trained", "products"), [(False, 2), (True, 3)])
def test_a_frozen_layer_needs_no_gradient_of_its_weights(trained: bool, products: int) -> None:
    layer = fake_linear(8, 16, trained=trained)
    with on_skeletons:
        inputs = torch.empty(4, 8, requires_grad=True)
        assert count(lambda: layer(inputs).sum().backward()).flops == products * 2 * 4 * 8 * 16


def test_attention_costs_twice_as_much_backward() -> None:
    with on_skeletons:
        q, k, v = (torch.empty(1, 2, 32, 16, requires_grad=True) for _ in range(3))
        forward = count(lambda: F.scaled_dot_product_attention(q, k, v))
        both = count(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert forward.flops == 2 * (2 * 2 * 32 * 32 * 16)  # two products of two heads
    assert both.flops == 3 * forward.flops


def test_bytes_kept_and_at_most() -> None:
    with on_skeletons:
        x = torch.empty(1000, requires_grad=True)
        counted = count(lambda: (x * 2).exp())
    # 4 bytes a number: exp keeps its result for the backward pass, x*2 is gone by then.
    assert counted.kept == 4000
    assert counted.peak == 8000


def test_real_tensors_are_counted_as_fake_ones_are() -> None:
    layer, x = nn.Linear(8, 16), torch.rand(4, 8)
    assert count(lambda: layer(x)).flops == 2 * 4 * 8 * 16


def test_tied_weights_stay_tied() -> None:
    with on_meta(torch.bfloat16):
        model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        model[1].weight = model[0].weight  # pyright: ignore
    make_fake(model)
    assert model[0].weight is model[1].weight
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
