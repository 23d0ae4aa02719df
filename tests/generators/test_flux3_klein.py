"""What only FLUX 3 has: a modular checkpoint, texts in windows of 80 tokens, a flow map."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, STEPS, denoise
from helpers import assert_near
from tiny_pipelines import build_flux3, build_klein
from toy_world import blocks

from customized_grpo.errors import ConfigError
from customized_grpo.tools.doctor.folders import gaps

CPU = torch.device("cpu")
(FAMILY,) = (family for family in FAMILIES if family.name == "flux3-klein")
LONG = "a cat on the beach, at dawn, beside a red boat, with a small dog that looks at the sea"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As ``hf download`` leaves it: its index names the repository, not the folder."""
    folder = tmp_path_factory.mktemp("flux3-klein")
    build_flux3(folder)
    index = folder / "modular_model_index.json"
    index.write_text(index.read_text().replace(json.dumps(str(folder)), '"someone/flux-3"'))
    assert "someone/flux-3" in index.read_text()
    return str(folder)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    build_flux3(tmp_path)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    return tmp_path


def test_texts_of_two_windows_in_one_batch(checkpoint: str) -> None:
    """The transformer reads the padding: that of a short text does not grow with a long one."""
    generator, stock = FAMILY.config(checkpoint).build(CPU), FAMILY.load(checkpoint)
    tasks = [blocks(), blocks(prompt=LONG), blocks(seed=1)]
    parts = [generator.encode([task]) for task in tasks]
    lengths = [part.per_sample["encoder_hidden_states"].shape[1] for part in parts]
    assert lengths == [80, 160, 80]
    noise = generator.noise(3, torch.Generator().manual_seed(0))
    together = denoise(generator, generator.encode(tasks), noise)
    for task, row, found in zip(tasks, noise, together, strict=True):
        assert_near(found[None], FAMILY.latents(stock, task, row[None], STEPS))


def test_the_distilled_model_is_refused(tmp_path: Path) -> None:
    build_flux3(tmp_path, distilled=True)
    config = FAMILY.config(str(tmp_path))
    for refused in (config.check, lambda: config.build(CPU)):
        with pytest.raises(ConfigError, match=r"^path: must be a base model, got the distilled"):
            refused()


def test_a_checkpoint_of_another_family_is_refused(tmp_path: Path) -> None:
    """Its index says what its parts are, and the stock pipeline takes them."""
    build_klein(tmp_path, distilled=False)
    match = r"^path: text_encoder must be a Qwen3VL.*, got a Qwen3ForCausalLM in .*flux3-klein"
    with pytest.raises(ConfigError, match=match):
        FAMILY.config(str(tmp_path)).build(CPU)


def test_guidance_has_to_be_said(checkpoint: str) -> None:
    config = type(FAMILY.config(checkpoint))(path=checkpoint, text_layers=(1, 2, 3))
    with pytest.raises(ConfigError, match=r"^guidance_scale: a base model needs one"):
        config.build(CPU)


def test_missing_weights_are_named(checkpoint: str, damaged: Path) -> None:
    """Which the stock pipeline logs and goes on without; the prompt upsampler is not missed."""
    assert gaps(Path(checkpoint), "pipeline") == []
    assert gaps(damaged, "pipeline") == ["vae/model.safetensors is missing"]
    with pytest.raises(ConfigError, match=r"^path: .* cannot be loaded .*vae"):
        FAMILY.config(str(damaged)).build(CPU)
