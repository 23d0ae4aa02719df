"""The configs of the large models train, here with a tiny checkpoint in the same format."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from families import FAMILIES, TEXT
from helpers import ROOT
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import build_flux1

from customized_grpo.config import AdvantageConfig, ConstantSchedule, load_config
from customized_grpo.generators.lora import attach_lora
from customized_grpo.tools.estimate.judges import num_validations
from customized_grpo.training.train import train

LARGE = sorted(p for p in (ROOT / "configs").glob("*.yaml") if "embedded:" not in p.read_text())
LIKE = ("flux-kontext-24gb", "uno-paper-vlm")  # the same model as another of them
REWARDS = [
    {"type": "clip-text", "objective": "prompt", "path": "embedded:reward-clip"},
    {"type": "dinov2", "objective": "identity", "path": "embedded:reward-dino"},
]
PAPER = ROOT / "configs" / "uno-paper.yaml"
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


@pytest.mark.parametrize("path", [*LARGE, ROOT / "configs" / "emoji.yaml"], ids=lambda p: p.stem)
def test_an_alarm_can_sound_before_the_last_validation(path: Path) -> None:
    config = load_config(path)
    after_the_base = num_validations(config.train.num_updates, config.evaluation.validate_every) - 1
    assert after_the_base > config.faults.hacking_patience


def test_the_papers_recipe_is_that_of_the_released_code() -> None:
    """Numbers of config/train/syncd_1w_customized_grpo.yaml and train_customized_grpo.py."""
    config = load_config(PAPER)
    generator, rollout, train = config.generator, config.rollout, config.train
    identity = config.rewards[0]
    assert generator.guidance_scale == 3.5  # pyright: ignore
    assert config.evaluation.guidance_scale == 4  # eval_dreambench_grpo.yaml
    noisy = rollout.num_steps - 1
    assert (noisy, rollout.num_trained_steps) == (24, int(noisy * 0.6))
    assert (train.inner_updates, train.split) == (3, "samples")
    assert rollout.group_size // train.inner_updates == 4  # gradient_accumulation_steps
    assert (identity.type, identity.region) == ("dinov2", "subject")  # pyright: ignore
    assert (identity.output_region, identity.copy_penalty) == ("image", 0)  # pyright: ignore
    assert (train.learning_rate, train.weight_decay) == (2e-5, 1.1e-4)
    assert rollout.batch_size == train.micro_batch_size  # equal rounding, where the ratio counts
    assert config.data.path.endswith("train_1w_syncd_embedding.json")  # pyright: ignore


def test_the_judged_recipe_differs_where_the_released_code_does() -> None:
    """Numbers of config/train/syncd_1w_grpo_vlm.yaml and train_grpo_vlm.py."""
    paper, judged = load_config(PAPER), load_config(PAPER.with_stem("uno-paper-vlm"))
    assert {reward.type for reward in judged.rewards} == {"vlm-judge"}
    assert {reward.objective for reward in judged.rewards} == {"identity", "prompt"}
    assert judged.advantage == AdvantageConfig(
        shaping="linear", schedule=ConstantSchedule(prompt=0.5)
    )
    rollout = dataclasses.replace(paper.rollout, noise_level=0.3)
    train = dataclasses.replace(paper.train, learning_rate=5e-5)
    same = {name: getattr(judged, name) for name in ("rewards", "advantage", "name")}
    assert judged == dataclasses.replace(paper, rollout=rollout, train=train, **same)


def test_the_papers_lora_is_on_every_layer_of_unos(tmp_path: Path) -> None:
    """UNO's processors adapt linear2 of all single blocks, which is diffusers' proj_out."""
    build_flux1(tmp_path, FluxPipeline)
    config = load_config(PAPER, ["--generator.path", str(tmp_path), "--lora.rank", "4"])
    transformer = FluxPipeline.from_pretrained(tmp_path).transformer
    assert config.lora is not None
    attach_lora(transformer, config.lora, ())
    adapted = {name for name, m in transformer.named_modules() if isinstance(m, LoraLayer)}
    single = {f"single_transformer_blocks.{i}" for i in range(transformer.config.num_single_layers)}
    assert {n.removesuffix(".proj_out") for n in adapted if n.endswith("proj_out")} == single
    assert {name.split(".")[0] for name in adapted} == {
        "transformer_blocks",
        "single_transformer_blocks",
    }
    double = [name for name in adapted if name.startswith("transformer_blocks.0.")]
    assert len(double) == 8  # q, k, v and out of both streams


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.long if path.stem in LIKE else [])
        for path in LARGE
    ],
)
def test_the_config_trains_a_tiny_model(path: Path, photos: Path, tmp_path: Path) -> None:
    config = load_config(path)
    name = config.generator.type
    if "FLUX.2-klein-base" in config.generator.path:
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
        "evaluation.num_validation": 1,
    }
    if config.generator.type == "uno":
        changes |= {"generator.uno_lora": "null", "generator.reference_long_side": SIDE}
    if config.generator.type == "qwen-image-edit-plus":
        changes |= {f"generator.{name}": value for name, value in QWEN.items()}
    if config.generator.type == "qwen-image-2.1":
        changes["generator.reference_area"] = SIDE * SIDE
    if config.generator.quantization == "nf4":  # needs a GPU
        changes["generator.quantization"] = "null"
    if config.generator.quantization == "int8":
        pytest.importorskip("torchao", reason="needs the extra torchao")
    flags = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
    if config.generator.type in ("flux2-klein", "flux3-klein"):
        flags += ["--generator.text_layers", "1", "2", "3"]
    run = train(load_config(path, flags))
    weights = load_file(run / "weights" / "pytorch_lora_weights.safetensors")
    moved = [tensor for name, tensor in weights.items() if "lora_B" in name]
    assert any(tensor.any() for tensor in moved)
    assert all(tensor.isfinite().all() for tensor in moved)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"gain/identity", "gain/prompt"} <= last.keys()  # does it work? is answered by default
