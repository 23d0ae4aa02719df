"""Every command and snippet of the README does what it says."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT
from PIL import Image

from customized_grpo.cli import main
from customized_grpo.config import load_config

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = [
    "--rollout.prompts_per_rollout", "1",
    "--rollout.group_size", "2",
    "--rollout.num_steps", "3",
    "--rollout.num_trained_steps", "1",
    "--train.num_updates", "1",
    "--train.inner_updates", "1",
    "--evaluation.num_examples", "4",
]  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands(program: str) -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [w[1:] for w in words if w and Path(w[0]).name == program]


def test_make_targets_exist() -> None:
    assert commands("make") == [["demo"], ["test"]]
    for target in commands("make"):
        subprocess.run(["make", "-n", *target], cwd=ROOT, check=True, capture_output=True)


def test_cgrpo_commands_and_the_lora_snippet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    Image.new("RGB", (80, 80), "gold").save(tmp_path / "reference.png")
    for words in commands("cgrpo"):
        small = {"train": SMALL, "resume": ["--train.num_updates", "2"]}.get(words[0], [])
        assert main([*words, *(small if "--help" not in words else [])]) == 0, words
    assert "tuned - base" in capsys.readouterr().out
    assert (tmp_path / "page" / "report.html").exists()
    (snippet,) = (block for block in blocks("python") if "load_lora_weights" in block)
    names: dict = {}
    exec(snippet, names)
    assert names["pipeline"].get_list_adapters() == {"transformer": ["default_0"]}
    assert names["image"].size == (64, 64)


def test_ops_snippet() -> None:
    (snippet,) = (block for block in blocks("python") if "customized_grpo.ops" in block)
    names: dict = {}
    exec(snippet, names)
    assert names["total"].shape == torch.Size([24, 25])


def test_own_pictures_snippets_are_a_valid_config(tmp_path: Path) -> None:
    (example,) = blocks("json")
    assert set(json.loads(example)) == {"prompt", "references", "masks", "subject"}
    (sections,) = blocks("yaml")
    config = yaml.safe_load((ROOT / "configs" / "emoji.yaml").read_text())
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(config | yaml.safe_load(sections)))
    assert load_config(path).generator.path == "black-forest-labs/FLUX.1-Kontext-dev"


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)|src=\"([^\"]+)\"", README):
        assert (ROOT / (target[0] or target[1])).exists(), target
