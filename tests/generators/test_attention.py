"""The kernel of a transformer's attention; those that need a GPU have stand-ins."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from families import FAMILIES, Family
from helpers import ROOT, assert_near
from torch import Tensor
from toy_world import blocks

from customized_grpo.config import RunConfig, check_config, load_config
from customized_grpo.errors import ConfigError
from customized_grpo.generators.base import Generator
from customized_grpo.runs.resume import check_changes

CPU = torch.device("cpu")
active = attention_dispatch._AttentionBackendRegistry.get_active_backend


@torch.no_grad()
def velocity(generator: Generator, autocast: bool = False) -> Tensor:
    noise = generator.noise(1, torch.Generator().manual_seed(0))
    conditioning = generator.encode([blocks()])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return generator.velocity(noise, torch.tensor([0.7]), conditioning)


@pytest.fixture(params=[0, 2, 4], ids=lambda number: FAMILIES[number].name)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.mark.parametrize("name", ["sdpa", "math"])
def test_every_kernel_computes_the_same(family: Family, name: Any, tmp_path: Path) -> None:
    family.build(tmp_path)
    config = family.config(str(tmp_path))
    default = active()
    generator = dataclasses.replace(config, attention=name).build(CPU)
    kinds = {
        getattr(module.processor, "_attention_backend", None)
        for module in generator.transformer.modules()
        if hasattr(module, "processor")
    }
    assert kinds == {{"sdpa": "native", "math": "_native_math"}[name]}
    assert not any("forward" in vars(module) for module in generator.transformer.modules())
    assert_near(velocity(generator), velocity(config.build(CPU)))
    assert active() == default  # not that of other models in this process


def test_a_flash_kernel_gets_16_bits_and_no_mask(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under an autocast that leaves norms in float32, as CUDA's does."""
    name, backend = "flash", AttentionBackendName.FLASH
    if family.name == "qwen-image-edit-plus":
        name, backend = "flash_varlen", AttentionBackendName.FLASH_VARLEN
    native, seen = attention_dispatch._native_attention, []
    norm = torch.nn.RMSNorm.forward

    def flash(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        seen.append(({query.dtype, key.dtype, value.dtype}, attn_mask))
        return native(query, key, value)

    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: norm(self, x).float())
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setitem(registry._backends, backend, flash)
    monkeypatch.setitem(
        registry._supported_arg_names, backend, {"query", "key", "value", "attn_mask"}
    )
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    family.build(tmp_path)
    config = dataclasses.replace(family.config(str(tmp_path)), dtype="bfloat16")
    ours = velocity(dataclasses.replace(config, attention=name).build(CPU), autocast=True)
    assert seen == [({torch.bfloat16}, None)] * len(seen)
    assert seen
    theirs = velocity(dataclasses.replace(config, attention="sdpa").build(CPU), autocast=True)
    assert (ours - theirs).abs().max() < 0.02 * theirs.std()


def test_what_a_kernel_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kontext, _, _, _, qwen, *_ = (family.config("nowhere") for family in FAMILIES)
    flash = dataclasses.replace(kontext, attention="flash")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^attention: 'flash' needs a GPU, .* use 'sdpa'$"):
        flash.check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", False)
    with pytest.raises(
        ConfigError, match=r"'flash' needs another package .* pip install flash-attn"
    ):
        flash.check()
    with pytest.raises(ConfigError, match=r"'flash', which takes no mask, .* use 'flash_varlen'"):
        dataclasses.replace(qwen, attention="flash").check()
    dataclasses.replace(qwen, attention="efficient").check()


def test_names_are_checked_when_the_config_is_read() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "configs" / "emoji.yaml", ["--generator.attention", "fast"])
    for name in ("generator.attention", "auto", "sdpa", "flash_varlen", "xformers", '"fast"'):
        assert name in str(caught.value)


def test_a_kernel_and_what_it_cannot_do_do_not_go_together(tiny_config: RunConfig) -> None:
    def config(attention: str, **fields: Any) -> RunConfig:
        generator = dataclasses.replace(tiny_config.generator, attention=attention)
        return dataclasses.replace(tiny_config, generator=generator, **fields)

    with pytest.raises(ConfigError, match="auto, sdpa, math, efficient with deterministic"):
        check_config(config("flash", deterministic=True, mixed_precision="bf16"))
    with pytest.raises(ConfigError, match="another kernel than 'cudnn' in float32"):
        check_config(config("cudnn"))
    check_config(config("cudnn", mixed_precision="bf16"))
    check_config(config("efficient", deterministic=True))


def test_a_run_may_go_on_with_another_kernel(tiny_config: RunConfig) -> None:
    generator = dataclasses.replace(tiny_config.generator, attention="sdpa")
    other = dataclasses.replace(tiny_config, generator=generator, deterministic=True)
    check_changes(tiny_config, other, allow_changed=False)
