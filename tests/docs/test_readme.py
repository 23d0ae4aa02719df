"""Every command and snippet of the README does what it says."""

import subprocess
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from six_photos import SMALL, take_photos
from snippets import blocks, commands

from customized_grpo.cli.main import main

COMMANDS = commands("README.md")


def test_make_targets_exist() -> None:
    targets = [words[1:] for words in COMMANDS if words[0] == "make"]
    assert targets == [["demo"], ["test"]]
    assert {words[0] for words in COMMANDS} == {"make", "source", "cgrpo"}
    for target in targets:
        subprocess.run(["make", "-n", *target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_the_way_from_photos_to_a_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    take_photos(tmp_path / "photos", 6)
    for program, *words in COMMANDS:
        if program == "cgrpo":
            assert main([*words, *(SMALL if words[0] == "train" else [])]) == 0, words
    assert "tuned - base" in capsys.readouterr().out
    assert Path("my-dog/lora/README.md").exists()


def test_ops_snippet() -> None:
    (snippet,) = blocks("README.md", "python")
    names: dict = {}
    exec(snippet, names)
    assert names["total"].shape == torch.Size([24, 25])
