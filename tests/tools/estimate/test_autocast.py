"""CUDA's types on a CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from customized_grpo.config import LoraSettings
from customized_grpo.tools.estimate.autocast import _IN_FLOAT32, cuda_autocast
from customized_grpo.tools.estimate.checkpoints import pipeline_components
from customized_grpo.tools.estimate.transformer import Tokens, count_transformer

HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"


def types() -> list[torch.dtype]:
    x = torch.rand(1, 8, 4, 4)
    half = F.conv2d(x, torch.rand(8, 8, 1, 1))
    found = [half, F.gelu(half), F.group_norm(half, 2), F.interpolate(half, scale_factor=2.0)]
    rows = half.flatten(2)
    found += [F.layer_norm(rows, (16,)), F.rms_norm(rows, (16,)), rows.softmax(-1), rows**2]
    return [tensor.dtype for tensor in found]


def test_norms_and_upsampling_are_in_float32_and_only_inside() -> None:
    half, full = torch.bfloat16, torch.float32
    with cuda_autocast(enabled=True):
        assert types() == [half, half, *[full] * 6]
    with cuda_autocast(enabled=False):
        assert set(types()) == {full}
    with torch.autocast("cpu", torch.bfloat16):
        assert types()[:5] == [half] * 5


def test_the_rules_are_those_of_torch() -> None:
    text = HEADER.read_text()
    blocks = re.findall(r"#define AT_FORALL_FP32\w*\(_\)(.*?)\n\n", text, re.DOTALL)
    known = {name for block in blocks for name in re.findall(r"_\((\w+)", block)} | {"norm"}
    assert len(known) > 50
    assert {name.partition(".")[0] for name in _IN_FLOAT32} <= known


@pytest.mark.slow
def test_flux_keeps_what_it_would_keep_on_cuda() -> None:
    """Residual stream and norms of 2,560 tokens: in bfloat16 it would be .28 GB."""
    component = pipeline_components("black-forest-labs/FLUX.1-dev")["transformer"]
    tokens = Tokens(target=(32, 32), references=((32, 32),), text=512)
    counted = count_transformer(component, tokens, LoraSettings(rank=64), torch.bfloat16, True)
    assert counted.forward_peak == pytest.approx(0.452e9, rel=0.01)
    assert counted.pair_peak + counted.casts == pytest.approx(16.9e9, rel=0.01)
