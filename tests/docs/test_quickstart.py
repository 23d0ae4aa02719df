"""examples/quickstart.ipynb runs from top to bottom; docs/rented_gpu.md has its commands."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from six_photos import SMALL, take_photos
from snippets import commands

from customized_grpo.cli.main import main

PAGE = "docs/rented_gpu.md"
CELLS = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]


def test_the_notebook_is_saved_without_outputs() -> None:
    assert not any(cell.get("outputs") for cell in CELLS)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)


@pytest.mark.slow
def test_the_notebook_makes_a_lora_of_six_photos_by_the_commands_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    take_photos(tmp_path / "photos", 6)
    ran: list[list[str]] = []

    def run(words: list[str], *, check: bool) -> None:
        assert (words[1:3], check) == (["-m", "customized_grpo"], True)
        ran.append(words[3:])
        assert main(words[3:]) == 0, words  # in this process: each would load torch for itself

    monkeypatch.setattr(subprocess, "run", run)
    parameters, *rest = ("".join(c["source"]) for c in CELLS if c["cell_type"] == "code")
    names: dict[str, object] = {}
    exec(parameters, names)
    assert names["FLAGS"] == ""
    names["FLAGS"] = shlex.join(SMALL)
    for cell in rest:
        exec(cell, names)
    assert Path("my-subject/lora/pytorch_lora_weights.safetensors").exists()
    for program, *words in commands(PAGE):
        assert program == "pip" or any(line[: len(words)] == words for line in ran), words
