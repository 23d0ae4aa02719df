"""docs/evaluation.md: its commands run, its files are read as it says, its tables are complete."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from made_runs import make_run
from snippets import blocks, commands, snippets
from worlds import smooth, write_png

from customized_grpo import registry
from customized_grpo.cli.main import main
from customized_grpo.config import RunConfig, load_benchmark

PAGE = "docs/evaluation.md"
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
SHIPPED = sorted((ROOT / "configs" / "benchmarks").glob("*.yaml"))
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]


def by_import_path(raw: dict) -> dict:
    """A type is known by name only where the package was installed since."""
    for metric in raw["metrics"]:
        metric["type"] = DECLARED[registry.REWARDS][metric["type"]]
    return raw


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_benchmarks_are_valid(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "benchmark.yaml"
    file.write_text(yaml.safe_dump(by_import_path(yaml.safe_load(path.read_text()))))
    config = load_benchmark(file)
    objectives = {metric.objective for metric in config.metrics}
    assert objectives == {"identity", "prompt"} - {"prompt" * ("offline" in path.stem)}
    folder = ["--generator", "null", "--images", "pictures", "--sampling", "{}"]
    assert load_benchmark(file, folder).images == "pictures"
    for line in re.findall(r"^#\s+cgrpo evaluate (\S+)", path.read_text(), re.M):
        assert (ROOT / line) == path


def test_the_dreambench_config_is_the_table() -> None:
    raw = yaml.safe_load((ROOT / "configs" / "benchmarks" / "dreambench.yaml").read_text())
    table = TEXT[TEXT.index("| in papers") : TEXT.index("All but `dino`")]
    named = set(re.findall(r"^\|[^|]+\| `([\w-]+)` \|", table, re.M))
    assert named == {metric["type"] for metric in raw["metrics"]}
    for metric in raw["metrics"]:
        if "path" in metric:
            assert f"`{metric['path']}`" in table


def test_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load((ROOT / "configs" / "benchmarks" / "emoji.yaml").read_text())
    raw["benchmark"]["num_examples"] = 4
    raw["sampling"] |= {"num_steps": 2}
    emoji = Path("configs/benchmarks/emoji.yaml")
    emoji.parent.mkdir(parents=True)
    emoji.write_text(yaml.safe_dump(raw))
    Path("mine.yaml").write_text(*blocks(PAGE, "yaml"))
    Path("pictures").mkdir()
    for name, text in snippets(PAGE, "jsonl").items():
        folder = Path("pictures" if name == "manifest.jsonl" else ".")
        (folder / name).write_text(text)
        for picture in re.findall(r'"([^"]+\.png)"', text):
            if not picture.startswith("rex/") or folder == Path("."):
                write_png(folder / picture, smooth(len(picture)))
    lines = [words for program, *words in commands(PAGE) if program == "cgrpo"]
    assert len(lines) == 6
    for words in lines:
        assert main(words) == 0, words
    assert "--sampling.num_steps = 2" in capsys.readouterr().out
    for name, count in {"emoji-base": 4, "again": 4, "folder": 4, "mine": 2, "half": 2}.items():
        written = json.loads(Path("evaluations", name, "benchmark.json").read_text())
        assert len(written["yardstick"]["items"]) == count
        assert written["complete"] is True


def test_the_rows_of_the_table_of_a_run_are_explained(
    tiny_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tiny_config)
    assert main(["evaluate", str(run)]) == 0
    table = capsys.readouterr().out.split("tuned - base", 1)[1].splitlines()
    names = {line.split()[0].split("/")[0] for line in table[1:-2]}  # not the note, the verdict
    assert {"prompt", "copy", "joint", "hacking_gap", "diversity"} <= names
    _, section = TEXT.split("## The table of a run\n")
    rows = "\n".join(re.findall(r"^\| (.*?) \|", section.split("\n## ")[0], re.M))
    assert {name for name in names if f"`{name}" not in rows} == set()
