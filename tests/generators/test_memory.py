"""What saves memory trains all the same: a quantised base, an optimizer with a small state."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline
from families import FAMILIES, Family, denoise, run_config
from toy_world import blocks

from customized_grpo.config import LoraSettings, RunConfig
from customized_grpo.errors import ConfigError
from customized_grpo.generators.lora import attach_lora
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
