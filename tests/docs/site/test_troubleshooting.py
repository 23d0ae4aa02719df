"""docs/troubleshooting.md quotes messages that exist; every page names fields that exist."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from helpers import ROOT, changed

from customized_grpo import registry
from customized_grpo.config import BenchmarkConfig, RunConfig, StudyConfig, list_fields
from customized_grpo.tools.serve.config import ServeConfig
from customized_grpo.training.train import train

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
QUOTES = [quote.strip("` ") for quote in re.findall(r"^> (.*)$", PAGE, re.M)]
HOLE = "\0"
FILE = re.compile(r"\.(jsonl?|md|png|py|safetensors|yaml)$")


def texts() -> list[str]:
    """Every string of the source, with holes where values are put in."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else HOLE for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[dgrs]", HOLE, node.value))
    return found


SOURCE = texts()


@pytest.mark.parametrize("quote", QUOTES)
def test_quoted_messages_exist(quote: str) -> None:
    """Word for word, where the page has no dots."""
    words = quote.split("...")
    assert sum(map(len, words)) > 15, "too short to be told from others"
    pattern = re.compile(".*".join(map(re.escape, words)), re.S)
    assert any(pattern.search(text) for text in SOURCE)


def test_there_are_quotes() -> None:
    assert len(QUOTES) > 25


def known_fields() -> set[str]:
    roots = (RunConfig, BenchmarkConfig, StudyConfig, ServeConfig)
    known = {info.path for root in roots for info in list_fields(root)}
    groups = {
        "data": registry.DATA,
        "generator": registry.GENERATORS,
        "algorithm": registry.ALGORITHMS,
    }
    for section, group in groups.items():
        for name in registry.plug_types(group):
            fields = list_fields(registry.load_plug(group, name))
            known |= {f"{section}.{info.path}" for info in fields}
    return known


KNOWN = known_fields()
SECTIONS = {path.split(".")[0] for path in KNOWN if "." in path}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_fields_that_a_page_names_exist(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    code = " ".join(re.findall(r"`([^`\n]+)`", prose))
    named = re.findall(r"(?<![\w./-])(?:--)?([a-z]\w*(?:\.[a-z]\w*)+)(?![\w(/.-])", code)
    named = {name for name in named if name.split(".")[0] in SECTIONS and not FILE.search(name)}
    assert named <= KNOWN


def test_the_log_has_the_numbers_of_the_table(tiny_config: RunConfig) -> None:
    small = {"num_steps": 2, "num_trained_steps": 1, "group_size": 2, "prompts_per_rollout": 1}
    run = train(changed(tiny_config, rollout=small, train={"num_updates": 1}))
    rows = (run / "metrics.jsonl").read_text().splitlines()
    logged = {
        re.sub(r"^reward/[\w-]+/", "reward/NAME/", key) for r in rows for key in json.loads(r)
    }
    table = PAGE[PAGE.index("| in the log") : PAGE.index("## It does not start")]
    named = {name for cell in re.findall(r"^\| (`.*?) \|", table, re.M) for name in cell.split("`")}
    named = {name for name in named if re.match(r"\w", name)}
    assert len(named) == 11
    assert named <= logged
