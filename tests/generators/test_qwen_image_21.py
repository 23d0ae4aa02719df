"""What only Qwen-Image-2.1 has: slots of 32 pixels, references of any shape, transparency."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, STEPS, denoise
from helpers import assert_near
from toy_world import blocks

from customized_grpo.config import CacheConfig
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.generators.cache import CachedEncoder
from customized_grpo.types import Example

CPU = torch.device("cpu")
(FAMILY,) = (family for family in FAMILIES if family.name == "qwen-image-2.1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("qwen-image-2.1")
    FAMILY.build(folder)
    return str(folder)


def test_references_of_other_shapes_than_the_target(checkpoint: str) -> None:
    generator, stock = FAMILY.config(checkpoint).build(CPU), FAMILY.load(checkpoint)
    square = blocks(2)
    wide = square.references[1][:, :64].repeat(1, 1, 2)[:, :, :128]
    task = Example(
        id="wide", prompt="both on a table", references=(square.references[0], wide), subject="cup"
    )
    noise = generator.noise(1, torch.Generator().manual_seed(0))
    ours = denoise(generator, generator.encode([task]), noise)
    assert_near(ours, FAMILY.latents(stock, task, noise, STEPS))


def test_sides_are_whole_slots(checkpoint: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^height: must be a multiple of 32, .* got 48; write 32 or 64"
    ):
        dataclasses.replace(FAMILY.config(checkpoint), height=48).build(CPU)


@pytest.mark.parametrize(("area", "side"), [(32 * 32, 32), (512 * 512, 512)])
def test_references_that_the_text_encoder_would_resize_are_refused(
    checkpoint: str, area: int, side: int
) -> None:
    generator = dataclasses.replace(FAMILY.config(checkpoint), reference_area=area).build(CPU)
    match = rf"references of 4096 to 65536 pixels, got {side} x {side}; change generator.reference_"
    for refused in (generator.check, lambda example: generator.encode([example])):
        with pytest.raises(DataError, match=match):
            refused(blocks())


def test_what_is_transparent_is_white(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = FAMILY.config(checkpoint).build(CPU)
    noise = generator.noise(1, torch.Generator().manual_seed(0))
    pixels = torch.rand(1, 4, 1, 64, 128) * 2 - 1
    decoded = SimpleNamespace(sample=pixels)
    monkeypatch.setattr(generator.pipeline.vae, "decode", lambda _: decoded)
    colour, opacity = (pixels[:, :, 0] / 2 + 0.5).split([3, 1], 1)
    assert_near(generator.decode(noise), opacity * colour + (1 - opacity))
    pixels[:, 3] = -1
    assert (generator.decode(noise) == 1).all()


def test_encodings_come_back_from_disk(checkpoint: str, tmp_path: Path) -> None:
    config = FAMILY.config(checkpoint)
    generator = config.build(CPU)
    noise = generator.noise(1, torch.Generator().manual_seed(0))
    for seen in range(2):
        encode = CachedEncoder(generator, config, CacheConfig(folder=str(tmp_path)))
        found = denoise(generator, encode([blocks()]), noise)
        assert torch.equal(found, denoise(generator, generator.encode([blocks()]), noise)), seen


def test_a_long_prompt_is_cut(checkpoint: str) -> None:
    config = dataclasses.replace(FAMILY.config(checkpoint), max_sequence_length=5)
    limit, short = config.text_limit(), config.build(CPU)
    assert limit is not None
    fits, longer = limit.count(["a dog", "a dog in the snow"])
    assert fits <= limit.most == 5 < longer
    assert FAMILY.config(checkpoint).text_limit() is None
    whole = FAMILY.config(checkpoint).build(CPU)
    ours = short.encode([blocks(prompt="a dog in the snow")]).per_sample["positive"]
    assert torch.equal(ours, whole.encode([blocks(prompt="a dog")]).per_sample["positive"])
