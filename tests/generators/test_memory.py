"""What saves memory trains all the same: a quantised base, an optimizer with a small state."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.models.transformers import transformer_flux
from families import FAMILIES, Family, denoise, run_config
from toy_world import blocks

from customized_grpo.config import LoraSettings, RunConfig
from customized_grpo.errors import ConfigError
from customized_grpo.generators.lora import attach_lora, trust_autocast
from customized_grpo.tools.estimate.autocast import cuda_autocast
from customized_grpo.training.build import make_optimizer, make_trainable
from customized_grpo.training.train import train

KONTEXT = FAMILIES[0]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("kontext")
    KONTEXT.build(folder)
    return str(folder)


def quantized(config: RunConfig, kind: str) -> RunConfig:
    generator = dataclasses.replace(config.generator, quantization=kind)
    return dataclasses.replace(config, generator=generator)


def test_an_int8_base_is_nearly_the_base_and_its_lora_trains(
    checkpoint: str, tmp_path: Path
) -> None:
    pytest.importorskip("torchao", reason="needs the extra torchao")
    plain = run_config(KONTEXT, checkpoint, tmp_path, num_updates=2, learning_rate=1e-2)
    config = quantized(plain, "int8")
    full, small = (c.generator.build(CPU) for c in (plain, config))
    weight = small.transformer.transformer_blocks[0].attn.to_q.weight
    assert type(weight).__name__ == "Int8Tensor"
    noise = full.noise(1, torch.Generator().manual_seed(0))
    base, close = (denoise(g, g.encode([blocks()]), noise) for g in (full, small))
    assert 0 < (close - base).abs().max() < 0.05 * base.std()
    run = train(config)
    stock = FluxKontextPipeline.from_pretrained(checkpoint)
    stock.load_lora_weights(str(run / "weights"))  # any base takes it
    trained = [p for n, p in stock.transformer.named_parameters() if "lora_B" in n]
    assert all(parameter.any() for parameter in trained)


def test_an_int8_base_keeps_no_wider_activations(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under CUDA's autocast, whose norms answer in float32: kernels that take half precision alone
    refuse what is wider, and a block's kept input is twice as large."""
    pytest.importorskip("torchao", reason="needs the extra torchao")
    config = quantized(run_config(KONTEXT, checkpoint, tmp_path), "int8")
    half = dataclasses.replace(config.generator, dtype="bfloat16")
    config = dataclasses.replace(config, generator=half, mixed_precision="bf16")
    generator = config.generator.build(CPU)
    make_trainable(generator, config)
    trust_autocast(generator.transformer)  # as where another LoRA is loaded
    quantized_layers = [m for m in generator.transformer.modules() if m._forward_pre_hooks]
    assert quantized_layers
    assert all(len(m._forward_pre_hooks) == 1 for m in quantized_layers)
    attend, kinds = transformer_flux.dispatch_attention_fn, set()

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> Any:
        kinds.add(value.dtype)
        return attend(query, key, value, **settings)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", spy)
    for block in generator.transformer.transformer_blocks:
        block.register_forward_hook(lambda m, i, o: kinds.update(t.dtype for t in o))
    noise = generator.noise(1, torch.Generator().manual_seed(0))
    with cuda_autocast(enabled=True):
        velocity = generator.velocity(noise, torch.tensor([0.7]), generator.encode([blocks()]))
        velocity.square().mean().backward()
    assert kinds == {torch.bfloat16}
    trained = [p for n, p in generator.transformer.named_parameters() if "lora_B" in n]
    assert all(p.grad is not None and p.grad.any() for p in trained)


def test_a_quantized_base_trains_no_weights_of_its_own(checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="needs the extra torchao")
    config = quantized(run_config(KONTEXT, checkpoint, tmp_path), "int8")
    config = dataclasses.replace(config, lora=None)
    with pytest.raises(ConfigError, match=r"lora: must not be null with generator\.quantization"):
        make_trainable(config.generator.build(CPU), config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nf4_says_that_it_needs_a_gpu(checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra bitsandbytes")
    config = quantized(run_config(KONTEXT, checkpoint, tmp_path), "nf4")
    with pytest.raises(ConfigError, match="'nf4' needs a GPU"):
        config.generator.build(CPU)


def test_the_small_optimizer_goes_where_adamw_goes(checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra bitsandbytes")
    config = run_config(KONTEXT, checkpoint, tmp_path, learning_rate=1e-2)
    after = {}
    for optimizer in ("adamw", "adamw-8bit"):
        generator = config.generator.build(CPU)
        torch.manual_seed(0)
        attach_lora(generator.transformer, LoraSettings(rank=32), generator.lora_targets)
        parameters = [p for p in generator.transformer.parameters() if p.requires_grad]
        settings = dataclasses.replace(config.train, optimizer=optimizer)
        adam = make_optimizer(parameters, settings)
        noise = generator.noise(1, torch.Generator().manual_seed(0))
        conditioning = generator.encode([blocks()])
        losses = []
        for _ in range(6):
            adam.zero_grad()
            velocity = generator.velocity(noise, torch.tensor([0.7]), conditioning)
            loss = velocity.square().mean()
            loss.backward()
            adam.step()
            losses.append(loss.item())
        after[optimizer] = losses
        if optimizer == "adamw-8bit":
            dtypes = {v.dtype for state in adam.state.values() for k, v in state.items()
                      if k == "state1"}  # fmt: skip
            assert torch.uint8 in dtypes
    assert after["adamw"][-1] < 0.9 * after["adamw"][0]
    assert after["adamw-8bit"] == pytest.approx(after["adamw"], rel=0.05)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_tiles_are_nearly_the_whole_picture(family: Family, tmp_path: Path) -> None:
    family.build(tmp_path)
    plain = family.config(str(tmp_path))
    whole, tiled = (c.build(CPU) for c in (plain, dataclasses.replace(plain, tile_vae=True)))
    vae = tiled.pipeline.vae
    assert vae.use_tiling
    if "qwen" in family.name:
        return  # its tiles are 256 px at least, the toy's pictures smaller
    vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
    noise = whole.noise(1, torch.Generator().manual_seed(0))
    one, other = whole.decode(noise), tiled.decode(noise)
    assert one.shape == other.shape
    assert 0 < (one - other).abs().mean() < 0.1
