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


@pytest.mark.parametrize("study", ["first_base", "sweep", "proof"])
def test_tables_are_those_of_what_is_kept(study: str) -> None:
    tables = markdown(Results.read(RESULTS / study / "results.json"))
    assert (RESULTS / study / "tables.md").read_text() == tables


@pytest.mark.parametrize(("page", "methods"), [("README.md", 4), ("docs/results.md", 11)])
def test_the_shares_are_those_of_what_is_kept(page: str, methods: int) -> None:
    text = (ROOT / page).read_text()
    kept = (RESULTS / "proof" / "tables.md").read_text().replace("0.", ".")
    shown = re.findall(
        r"^\| (?:base|naive|SARS|TDW|GDPO|min|prompt only|identity only|(?:\*\*)?Customized).*\|$",
        text,
        re.M,
    )
    own = [row for row in shown if row.count("|") == 6]  # shares; the paper's numbers have less
    assert len(own) == methods + 1
    for row in own:
        assert row in kept


def test_the_leaderboard_is_what_its_writer_makes_of_what_is_kept() -> None:
    file, page = RESULTS / "leaderboard" / "results.json", ROOT / "docs" / "leaderboard.md"
    study = "configs/studies/leaderboard.yaml"
    read = yaml.safe_load((ROOT / study).read_text())
    methods, about = read["methods"], read["about"]
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
    picture = "results/leaderboard/figures/right-ranking.png"
    command = f"cgrpo compare {study} {flags}"
    assert page.read_text() == leaderboard(results, command, picture, about)


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
