"""The documents show what is kept in the results, and their links lead somewhere."""

import re
from pathlib import Path

import pytest
from helpers import ROOT

from customized_grpo.evaluation.report.tables import markdown
from customized_grpo.evaluation.results import Results

DOCS = sorted((ROOT / "docs").glob("*.md"))
RESULTS = ROOT / "docs" / "results"


def test_results_show_the_tables_of_what_is_kept() -> None:
    tables = markdown(Results.read(RESULTS / "proof" / "results.json"))
    assert (RESULTS / "proof" / "tables.md").read_text() == tables
    assert tables.strip() in (ROOT / "docs" / "results.md").read_text()


def test_results_show_the_changes_of_the_sweep() -> None:
    tables = markdown(Results.read(RESULTS / "sweep" / "results.json"))
    assert (RESULTS / "sweep" / "tables.md").read_text() == tables
    _, changes = tables.split("### Change from the base\n")
    table = changes[changes.index("|") : changes.index("\n\n###")]
    assert table in (ROOT / "docs" / "results.md").read_text()


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_links_and_pictures_exist(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", path.read_text()):
        assert (path.parent / target).exists(), target
