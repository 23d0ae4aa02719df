"""docs/watching.md does what it says."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from logs import add, begin

from customized_grpo.cli.main import main
from customized_grpo.config import RunConfig, dump_config, load_config
from customized_grpo.runs.log import RunLog
from customized_grpo.runs.sinks.feed import feeding

PAGE = (ROOT / "docs" / "watching.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


@pytest.fixture(autouse=True)
def _mine(tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run and the config that the page speaks of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "my.yaml").write_text(dump_config(tiny_config))
    add(begin(dataclasses.replace(tiny_config, name="mine", output_dir="runs")), 1)


def test_commands(capsys: pytest.CaptureFixture) -> None:
    lines = [shlex.split(line, comments=True) for line in blocks("bash")[0].splitlines()]
    for words in lines:
        assert words[0] == "cgrpo"
        assert main(words[1:]) == 0
    assert capsys.readouterr().out.count("1 / 8 updates") == len(lines) - 1  # one is --json


def test_the_sinks_are_a_valid_config() -> None:
    (section,) = blocks("yaml")
    config = Path("my.yaml").read_text()
    assert "sinks: []\n" in config
    Path("my.yaml").write_text(config.replace("sinks: []\n", section))
    assert [sink.type for sink in load_config("my.yaml").sinks] == [
        "tensorboard", "wandb", "trackio",
    ]  # fmt: skip
    for flags in re.findall(r"--sinks\s+'(.+?)'", PAGE, re.S):
        assert len(load_config("my.yaml", ["--sinks", flags]).sinks) == 1


def test_a_sink_of_one_s_own() -> None:
    (snippet,) = blocks("python")
    Path("my_sinks.py").write_text(snippet)
    (type_,) = re.findall(r'`type: "(my_sinks:\w+)"`', PAGE)
    flags = ["--sinks", f'[{{type: "{type_}", file: lines.txt}}]']
    config = load_config("my.yaml", flags)
    log = RunLog(Path("runs", "own"), config, torch.device("cpu"))
    with feeding(config.sinks, config, log.folder):
        add(log, 1)
    assert Path("lines.txt").read_text() == "1 0.5\n"
