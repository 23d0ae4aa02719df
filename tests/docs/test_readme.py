"""Every command and snippet of the README does what it says."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from six_photos import SMALL, take_photos

from customized_grpo.cli.main import main

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def lines() -> list[list[str]]:
    """Words of the commands."""
    text = [line for block in blocks("bash") for line in block.splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in text) if words]


def commands(program: str) -> list[list[str]]:
    return [words[1:] for words in lines() if words[0] == program]


def test_make_targets_exist() -> None:
    assert commands("make") == [["demo"], ["test"]]
    assert {words[0] for words in lines()} == {"make", "source", "cgrpo"}
    for target in commands("make"):
        subprocess.run(["make", "-n", *target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_the_way_from_photos_to_a_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    take_photos(tmp_path / "photos", 6)
    for words in commands("cgrpo"):
        assert main([*words, *(SMALL if words[0] == "train" else [])]) == 0, words
    assert "tuned - base" in capsys.readouterr().out
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


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)|src=\"([^\"]+)\"", README):
        assert (ROOT / (target[0] or target[1])).exists(), target
