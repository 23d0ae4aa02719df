"""Checkpoints in folders: whole ones of every kind, and each kind of damage."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import changed
from safetensors.torch import save_file
from test_plugs import StrangersReward

from customized_grpo import assets
from customized_grpo.assets import resolve_checkpoint
from customized_grpo.config import LoraSettings, RunConfig
from customized_grpo.generators.uno import UnoConfig
from customized_grpo.rewards.clip_text import ClipTextConfig
from customized_grpo.rewards.hpsv2 import Hpsv2Config
from customized_grpo.rewards.pickscore import PickScoreConfig
from customized_grpo.tools.doctor.findings import Finding
from customized_grpo.tools.doctor.weights import named, weights


@pytest.fixture
def config(tiny_config: RunConfig, tmp_path: Path) -> RunConfig:
    """Generator and first reward in folders of their own."""
    for name, folder in (("generator", "model"), ("reward-clip", "clip")):
        shutil.copytree(resolve_checkpoint(f"embedded:{name}"), tmp_path / folder)
    config = changed(tiny_config, generator={"path": str(tmp_path / "model")})
    reward = ClipTextConfig(objective="prompt", path=str(tmp_path / "clip"))
    return dataclasses.replace(config, rewards=(reward, config.rewards[1]))


def found(config: RunConfig) -> dict[str, Finding]:
    return {finding.check: finding for finding in weights(config)}


def split(folder: Path, name: str) -> None:
    """A file of weights becomes two shards and their index."""
    from safetensors.torch import load_file

    state = load_file(folder / f"{name}.safetensors")
    (folder / f"{name}.safetensors").unlink()
    shards = {key: f"{name}-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(state)}
    for shard in set(shards.values()):
        save_file({k: state[k] for k, s in shards.items() if s == shard}, folder / shard)
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def test_whole_ones(config: RunConfig, tmp_path: Path) -> None:
    split(tmp_path / "model" / "transformer", "diffusion_pytorch_model")
    findings = found(config)
    assert {finding.status for finding in findings.values()} == {"ok"}
    assert set(findings) == {
        "generator.path", "rewards.0.path", "rewards.1.path", "evaluators.0.path",
        "evaluators.1.path", "evaluation.classifier",
    }  # fmt: skip
    assert re.search(r"is complete, \d\.\d MB of", findings["rewards.0.path"].found)


def test_a_checkpoint_is_named_once(config: RunConfig) -> None:
    config = dataclasses.replace(config, evaluators=(config.rewards[0], config.rewards[0]))
    fields = [checkpoint.field for checkpoint in named(config)]
    assert fields[:3] == ["generator.path", "rewards.0.path", "rewards.1.path"]
    assert len(fields) == 4


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_text(text)


def truncate(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_shard(folder: Path) -> None:
    split(folder / "transformer", "diffusion_pytorch_model")
    (folder / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def lose_the_index(folder: Path) -> None:
    split(folder / "transformer", "diffusion_pytorch_model")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()


def only_a_pickle(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "model.bin")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (pointer, "transformer/diffusion_pytorch_model.safetensors is a Git LFS pointer"),
        (truncate, "transformer/diffusion_pytorch_model.safetensors is damaged"),
        (lose_a_shard, "diffusion_pytorch_model-00002-of-00002.safetensors is missing"),
        (lose_the_index, "transformer/*.safetensors.index.json is missing"),
        (only_a_pickle, "vae/model.safetensors is missing; model.bin is a pickle"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer/ is missing"),
        (lambda f: (f / "text_encoder_2" / "config.json").unlink(), "text_encoder_2/config.json"),
        (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
        (lambda f: (f / "model_index.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "vae/model.safe"),
        (shutil.rmtree, "not found"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damage_is_named(config: RunConfig, tmp_path: Path, damage, text: str) -> None:
    damage(tmp_path / "model")
    findings = found(config)
    finding = findings.pop("generator.path")
    assert finding.status == "problem"
    assert text in finding.found
    assert finding.fix
    assert {other.status for other in findings.values()} == {"ok"}


def test_damage_of_a_model_that_comes_with_the_package(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(assets._ROOT, tmp_path / "assets")
    monkeypatch.setattr(assets, "_ROOT", tmp_path / "assets")
    pointer(tmp_path / "assets" / "generator")
    config = changed(config, generator={"path": "embedded:generator"})
    finding = found(config)["generator.path"]
    assert finding.status == "problem"
    assert finding.fix.startswith("reinstall it: pip install --force-reinstall")


def test_damage_of_a_reward_s_model(config: RunConfig, tmp_path: Path) -> None:
    folder = (tmp_path / "clip").rename(tmp_path / "my clip")
    reward = dataclasses.replace(config.rewards[0], path=str(folder))
    config = dataclasses.replace(config, rewards=(reward,))
    (folder / "model.safetensors").write_bytes(b"")
    finding = found(config)["rewards.0.path"]
    assert finding.status == "problem"
    assert "model.safetensors is empty" in finding.found
    assert finding.fix.endswith(f" --local-dir '{folder}'")


def test_second_checkpoints_and_files_of_another_name(config: RunConfig, tmp_path: Path) -> None:
    clip, own = str(tmp_path / "clip"), tmp_path / "own"
    own.mkdir()
    rewards = (
        Hpsv2Config(objective="prompt", path=str(own), file="x.pt", clip=clip),
        PickScoreConfig(objective="prompt", path=clip, processor=str(own)),
    )
    config = dataclasses.replace(config, rewards=rewards)
    findings = found(config)
    assert findings["rewards.0.path"].found == f"{own}: x.pt is missing"
    assert findings["rewards.0.clip"].status == findings["rewards.1.path"].status == "ok"
    assert "config.json is missing; tokenizer_config" in findings["rewards.1.processor"].found
    (own / "x.pt").write_bytes(b"zip")
    assert found(config)["rewards.0.path"].status == "ok"


@pytest.mark.parametrize("field", ["generator.uno_lora", "lora.path"])
def test_a_lora_is_a_file_or_a_folder(config: RunConfig, tmp_path: Path, field: str) -> None:
    def with_lora(path: Path) -> Finding:
        section, name = field.split(".")
        uno = UnoConfig(path="embedded:generator")
        plain = dataclasses.replace(config, generator=uno, lora=LoraSettings())
        return found(changed(plain, **{section: {name: str(path)}}))[field]

    (tmp_path / "lora").mkdir()
    assert "*.safetensors is missing" in with_lora(tmp_path / "lora").found
    file = tmp_path / "lora" / "dit_lora.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    assert with_lora(file).status == with_lora(tmp_path / "lora").status == "ok"
    file.write_bytes(file.read_bytes()[:-2])
    assert "is damaged" in with_lora(file).found
    assert "not found" in with_lora(tmp_path / "other.safetensors").found


def test_files_of_a_strangers_plug(config: RunConfig, tmp_path: Path) -> None:
    pointer(tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    reward = StrangersReward(objective="prompt", weights=str(file), folder=str(tmp_path / "clip"))
    findings = found(dataclasses.replace(config, evaluators=(reward,)))
    assert "is a Git LFS pointer" in findings["evaluators.0.weights"].found
    assert findings["evaluators.0.folder"].status == "ok"
