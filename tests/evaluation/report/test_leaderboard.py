"""The ranking of methods, and the page that is made of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_up import made_up
from matplotlib.collections import PathCollection

from customized_grpo.errors import ConfigError
from customized_grpo.evaluation.outcome import Judgement
from customized_grpo.evaluation.report.figures import figures
from customized_grpo.evaluation.report.leaderboard import leaderboard
from customized_grpo.evaluation.report.tables import markdown, ranking
from customized_grpo.evaluation.results import Cell, Results

_SHARE = "validation/share/both_right"


def _right(cell: Cell, count: int, curve: list[float], clock: list[float] | None) -> Cell:
    """A cell with ``count`` of ten pictures right in both."""
    right = [1.0] * count + [0.0] * (10 - count)
    columns = cell.judgement.columns | {"both_right": right}
    times = {} if clock is None else {"seconds": clock}
    return replace(
        cell,
        judgement=replace(cell.judgement, columns=columns),
        curve={"update": [0, 10, 20], _SHARE: curve, **times},
    )


@pytest.fixture
def ranked() -> Results:
    """``both`` above the base, which has .3 right, and ``naive`` below it, which comes first."""
    curves = {
        "naive": ([0.1, 0.2, 0.2], None),
        "both": ([0.3, 0.41, 0.39], [0.0, 100.0, 210.0]),
    }
    cells = []
    for cell in made_up().cells:
        curve, clock = curves[cell.method]
        if (cell.method, cell.seed) == ("both", 2):
            curve, clock = [0.2, 0.3, 0.6], [0.0, 50.0, 90.0]
        if (cell.method, cell.seed) == ("naive", 1):
            curve = [0.2, 0.5, 0.2]
        right = 2 if cell.method == "naive" else 5 + (cell.seed == 1)
        cells.append(_right(cell, right, curve, clock))
    return made_up(cells=cells)


def test_the_best_come_first_and_the_base_stands_where_it_belongs(ranked: Results) -> None:
    table = ranking(ranked)
    assert table is not None
    assert table.heads[:4] == ["", "seeds", "both right", "minus Customized-GRPO"]
    assert [row[:3] for row in table.rows] == [
        ["1. **Customized-GRPO**", "3", "0.533 ± 0.143"],
        ["base", "", "0.300"],
        ["2. naive GRPO 1:1", "3", "0.200 ± 0.000"],
    ]
    best, base, naive = (row[3:7] for row in table.rows)
    assert naive[0] == "**-0.333 ± 0.303**"
    assert (best[0], base[0]) == ("", "")
    assert base[1:] == ["0.600", "0.500", "0.100"]
    assert all(len(row) == len(table.heads) for row in table.rows)
    assert table.markdown() in markdown(ranked)


def test_when_a_level_is_first_reached(ranked: Results) -> None:
    """Of the mean over the seeds that got there, how many did; without seconds, updates alone."""
    table = ranking(ranked)
    assert table is not None
    best, base, naive = (row[-4:] for row in table.rows)
    assert table.heads[-4:] == [f"first at {level}" for level in (0.3, 0.4, 0.5, 0.6)]
    assert best == ["3, 17 s", "13, 97 s", *["20, 90 s (1 of 3)"] * 2]
    assert naive == [*["10 (1 of 3)"] * 3, "—"]
    assert base == [""] * 4
    never = [replace(c, curve={"update": [0], _SHARE: [0.1], "seconds": [0]}) for c in ranked.cells]
    unknown = [replace(cell, curve={}) for cell in ranked.cells]
    for cells, shown in ((never, "—"), (unknown, "")):
        table = ranking(replace(ranked, cells=cells))
        assert table is not None
        assert table.rows[0][-4:] == [shown] * 4
    begun = {"update": [0, 10], _SHARE: [0.4, 0.7], "seconds": [0, 9]}
    table = ranking(replace(ranked, cells=[replace(cell, curve=begun) for cell in ranked.cells]))
    assert table is not None  # a level at which all begin says nothing
    assert table.heads[-3:] == ["copies", "first at 0.5", "first at 0.6"]


def test_the_table_says_what_its_differences_leave_open(ranked: Results) -> None:
    """How many hold together, and whose runs are of another machine."""
    table = ranking(ranked)
    assert table is not None
    assert "at once" not in table.note  # there is only one
    assert "†" not in table.markdown()
    third = [replace(cell, method="third") for cell in ranked.of("naive").values()]
    third[1] = replace(third[1], environment={"device": "another machine"})
    table = ranking(
        replace(ranked, labels=ranked.labels | {"third": "a third"}, cells=[*ranked.cells, *third])
    )
    assert table is not None
    assert "hold for all 2 at once (Bonferroni) none of the 2 would be bold" in table.note
    assert "†: trained, at least in part, on another machine than Customized-GRPO;" in table.note
    names = [row[0] for row in table.rows]
    assert names == ["1. **Customized-GRPO**", "base", "2. naive GRPO 1:1", "3. a third †"]


def test_the_page_says_what_was_measured_on_what_and_what_is_missing(ranked: Results) -> None:
    labels = ranked.labels | {"later": "later", "last": "the last"}
    page = leaderboard(replace(ranked, labels=labels), "cgrpo compare x.yaml")
    assert "on 10 held-out examples by" in page
    assert "a machine (threads: 1)" in page
    assert "**Not run yet**: later; the last.\n" in page
    assert "`cgrpo compare x.yaml`" in page
    assert "Not run yet" not in leaderboard(ranked, "")
    told = " ".join(leaderboard(ranked, "", about="It is ours.").split())
    assert "(threads: 1). It is ours. |" in told
    assert all(len(line) <= 100 for line in page.splitlines() if not line.startswith("|"))
    assert page.index("| 1. **Customized-GRPO** | 3 | 0.533") < page.index("| base |")
    assert "![" not in page
    assert "![methods by pictures right in both](a/b.png)\n\n|" in leaderboard(
        ranked, "", "a/b.png"
    )


def test_the_figure_has_the_best_on_top_and_every_seed(ranked: Results) -> None:
    assert "right-ranking" not in figures(ranked)  # two methods need none
    same = [replace(c, method="third") for c in ranked.of("naive").values()]
    three = replace(
        ranked, labels=ranked.labels | {"third": "a third"}, cells=[*ranked.cells, *same[:-1]]
    )
    (axes,) = figures(three)["right-ranking"].axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    heights = [axes.transData.transform((0, row))[1] for row in axes.get_yticks()]
    assert heights == sorted(heights, reverse=True)
    assert labels[0] == "Customized-GRPO"
    dots = [c.get_offsets() for c in axes.collections if isinstance(c, PathCollection)]
    assert sorted(x for x, _ in dots[0]) == pytest.approx([0.5, 0.5, 0.6])
    assert len(dots[labels.index("a third")]) == 2
    tied = replace(three, cells=[*ranked.cells, *same])
    (axes,) = figures(tied)["right-ranking"].axes
    drawn = [text.get_text() for text in axes.get_yticklabels()]
    rows = [row[0].partition(". ")[2].strip("*") for row in ranking(tied).rows if row[0] != "base"]
    assert drawn == rows == ["Customized-GRPO", "naive GRPO 1:1", "a third"]


def test_a_page_of_nothing_says_so(ranked: Results) -> None:
    page = leaderboard(replace(ranked, cells=[]), "cgrpo compare x.yaml")
    assert "**Not run yet**: naive GRPO 1:1; Customized-GRPO." in page
    assert "|" not in page
    assert "Measured" not in page


def test_scores_alone_have_no_ranking(ranked: Results) -> None:
    bare = Judgement(columns={"dinov2": [0.5] * 10})
    scores = replace(ranked, cells=[replace(cell, judgement=bare) for cell in ranked.cells])
    assert ranking(scores) is None
    with pytest.raises(ConfigError, match="--leaderboard must be left out where nothing says"):
        leaderboard(scores, "")
