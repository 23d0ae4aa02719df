"""Every command of docs/using.md, in order, with a run in runs/mine."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from helpers import ROOT, changed
from made_runs import make_run
from PIL import Image

from customized_grpo.cli.main import main
from customized_grpo.config import RunConfig

PAGE = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


@pytest.fixture
def mine(tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run that the page speaks of, and the pictures and files beside it."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 64), "brown").save("bear.png")
    (rows,) = blocks("jsonl prompts.jsonl")
    Path("prompts.jsonl").write_text(rows)
    config = changed(tiny_config, rollout={"num_steps": 2, "num_trained_steps": 1})
    return make_run(dataclasses.replace(config, name="mine", output_dir="runs"))


def test_commands(mine: Path) -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    for words in (shlex.split(line, comments=True) for line in lines):
        assert words[0] == "cgrpo"
        assert main(words[1:]) == 0, words
    assert len(list(Path("generated").iterdir())) == 9
    assert len(list(Path("mine").iterdir())) == 5
    assert Path("my-lora/README.md").exists()
    assert Path("loras/mine.safetensors").exists()
    assert Path("my-model/model_index.json").exists()
