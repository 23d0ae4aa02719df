"""Pictures from latents: in the VAE's own precision, and a few at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from families import FAMILIES, Family, run_config
from torch import Tensor

from customized_grpo.generators import pipeline
from customized_grpo.tools.estimate.autocast import cuda_autocast
from customized_grpo.training.policy import make_policy

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_bfloat16_vae_decodes_as_in_the_stock_pipeline(family: Family, tmp_path: Path) -> None:
    """By the rules of CUDA autocast its norms would be in float32: other pictures."""
    family.build(tmp_path / "checkpoint")
    config = run_config(family, str(tmp_path / "checkpoint"), tmp_path)
    half = dataclasses.replace(config.generator, dtype="bfloat16")
    generator = half.build(CPU)
    policy = make_policy(generator, dataclasses.replace(config, mixed_precision="bf16"))
    latents = generator.noise(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = generator.pipeline.image_processor.postprocess(
            generator._decode(latents), output_type="pt"
        )
    with cuda_autocast(enabled=True):
        images = policy.decode(latents)
    assert images.dtype == torch.float32
    assert torch.equal(images, (generator._decode(latents).float() / 2 + 0.5).clamp(0, 1))
    assert torch.allclose(images, stock.float(), atol=2**-8)


def test_pictures_are_decoded_in_parts_of_limited_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[0]
    family.build(tmp_path / "checkpoint")
    generator = family.config(str(tmp_path / "checkpoint")).build(CPU)
    latents = generator.noise(5, torch.Generator().manual_seed(0))
    whole, sizes, decode = generator.decode(latents), list[int](), generator._decode

    def record(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return decode(part)

    monkeypatch.setattr(generator, "_decode", record)
    pixels = generator.height * generator.width
    monkeypatch.setattr(pipeline, "_DECODED_PIXELS", 2 * pixels + 1, raising=False)
    assert torch.allclose(generator.decode(latents), whole, atol=1e-5)
    assert sizes == [2, 2, 1]
