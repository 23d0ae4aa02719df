"""The documents show what is kept in the results, and their links lead somewhere."""

import re
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from customized_grpo.evaluation.outcome import Yardstick
from customized_grpo.evaluation.report.leaderboard import leaderboard
from customized_grpo.evaluation.report.tables import markdown
from customized_grpo.evaluation.results import Results

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "docs" / "results"
MEASURED = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("study", ["first_base", "sweep"])
def test_results_show_the_changes_of_what_is_kept(study: str) -> None:
    tables = markdown(Results.read(RESULTS / study / "results.json"))
    assert (RESULTS / study / "tables.md").read_text() == tables
    _, changes = tables.split("### Change from the base\n")
    assert changes[changes.index("|") : changes.index("\n\n###")] in MEASURED


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_small_table_has_the_numbers_of_what_is_kept(page: str) -> None:
    text, kept = (
        (path).read_text() for path in (ROOT / page, RESULTS / "first_base" / "tables.md")
    )
    for name in ("base", "naive GRPO 1:1", "**Customized-GRPO**"):
        row, *_ = re.findall(rf"^\| {re.escape(name)} \|(.*)$", text, re.M)
        full, *_ = re.findall(rf"^\| {re.escape(name)} \|(.*)$", kept, re.M)
        measured = full.replace("0.", ".").split("|")[:3]  # prompt, identity, hypervolume
        assert row.split("|")[:3] == measured


def test_the_leaderboard_is_what_its_writer_makes_of_what_is_kept() -> None:
    file, page = RESULTS / "leaderboard" / "results.json", ROOT / "docs" / "leaderboard.md"
    study = "configs/studies/leaderboard.yaml"
    methods = yaml.safe_load((ROOT / study).read_text())["methods"]
    nothing = Results(
        name="leaderboard",
        config="",
        yardstick=Yardstick(set="held_out", items=(), objectives={}),
        labels={method["name"]: method["label"] for method in methods},
        main="customized",
        cells=[],
    )
    results = Results.read(file) if file.exists() else nothing
    flags = "--results docs/results/leaderboard --leaderboard docs/leaderboard.md"
    assert page.read_text() == leaderboard(results, f"cgrpo compare {study} {flags}")


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", path.read_text()):
        assert (path.parent / target).exists(), target


_PROMISE = re.compile(
    r"bit by bit|last bit\b|bit-identical|last byte|without the\s+break|same run on"
)


@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
    + [ROOT / f"src/customized_grpo/{name}.py" for name in ("cli/train", "training/train")]
    + [ROOT / "src/customized_grpo/config/sections.py"],
    ids=lambda path: path.name,
)
def test_equal_bits_are_promised_on_a_cpu_only(path: Path) -> None:
    """Or on a GPU of which the paragraph or row says how."""
    for paragraph in re.split(r"\n\n|\n(?=[|*-])|\"\"\"", path.read_text()):
        if _PROMISE.search(paragraph):
            assert "CPU" in paragraph
