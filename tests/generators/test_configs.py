"""The configs of the large models train, here with a tiny checkpoint in the same format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, TEXT
from helpers import ROOT
from PIL import Image
from safetensors.torch import load_file

from customized_grpo.config import load_config
from customized_grpo.training.session import train

LARGE = sorted(p for p in (ROOT / "configs").glob("*.yaml") if "embedded:" not in p.read_text())
REWARDS = [
    {"type": "clip-text", "objective": "prompt", "path": "embedded:reward-clip"},
    {"type": "dinov2", "objective": "identity", "path": "embedded:reward-dino"},
]
SIDE = 64
QWEN = {"reference_area": SIDE * SIDE, "condition_area": SIDE * SIDE}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    random = torch.Generator().manual_seed(0)
    for subject in ("mug", "plush bear"):
        (tmp_path / "photos" / subject).mkdir(parents=True)
        for number in range(2):
            pixels = torch.randint(0, 256, (72, 96, 3), generator=random, dtype=torch.uint8)
            picture = Image.fromarray(pixels.numpy())
            picture.save(tmp_path / "photos" / subject / f"{number}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_the_config_trains_a_tiny_model(path: Path, photos: Path, tmp_path: Path) -> None:
    config = load_config(path)
    name = config.generator.type
    if "klein-base" in config.generator.path:
        name = "flux2-klein-base"
    (family, *_) = [f for f in FAMILIES if f.name == name]
    family.build(tmp_path / "checkpoint")
    changes = {
        "output_dir": tmp_path / "runs",
        "data": json.dumps({"type": "folder", "path": str(photos)}),
        "generator.path": tmp_path / "checkpoint",
        "generator.height": SIDE,
        "generator.width": SIDE,
        "generator.max_sequence_length": TEXT,
        "rewards": json.dumps(REWARDS),
        "evaluators": json.dumps(REWARDS),
        "lora.rank": 4,
        "rollout.group_size": 3,
        "rollout.prompts_per_rollout": config.train.inner_updates,
        "train.num_updates": config.train.inner_updates,
    }
    if config.generator.type == "uno":
        changes |= {"generator.uno_lora": "null", "generator.reference_long_side": SIDE}
    if config.generator.type == "qwen-image-edit-plus":
        changes |= {f"generator.{name}": value for name, value in QWEN.items()}
    if config.generator.quantization == "nf4":  # needs a GPU
        changes["generator.quantization"] = "null"
    if config.generator.quantization == "int8":
        pytest.importorskip("torchao", reason="needs the extra torchao")
    flags = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
    if config.generator.type == "flux2-klein":
        flags += ["--generator.text_layers", "1", "2", "3"]
    run = train(load_config(path, flags))
    weights = load_file(run / "weights" / "pytorch_lora_weights.safetensors")
    moved = [tensor for name, tensor in weights.items() if "lora_B" in name]
    assert any(tensor.any() for tensor in moved)
    assert all(tensor.isfinite().all() for tensor in moved)
