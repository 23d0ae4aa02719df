"""The report: what stands in it, that it is one file, and the same bytes each time."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from made_up import made_up, save_pictures
from PIL import Image

from customized_grpo.errors import ConfigError
from customized_grpo.evaluation.items import Item
from customized_grpo.evaluation.outcome import Judgement, Yardstick
from customized_grpo.evaluation.report import figures
from customized_grpo.evaluation.report.figures import _advantages_and_bonus
from customized_grpo.evaluation.report.page import study_pictures, write_report
from customized_grpo.evaluation.report.tables import markdown, tables
from customized_grpo.evaluation.results import Cell, Results
from customized_grpo.ops import synergy_bonus
from customized_grpo.rewards.truth import SHARES

CHROMIUM = shutil.which("chromium")

FIGURES = {
    "right-plane",
    "right-over-training",
    "plane",
    "learning-curves",
    "quadrants",
    "schedule",
    "conflicts",
}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    save_pictures(tmp_path)
    results = made_up()
    pictures = study_pictures(results, tmp_path)
    return write_report(results, tmp_path, "cgrpo compare x.yaml", pictures)


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        assert tag not in ("script", "link", "iframe")


def test_the_page_needs_no_other_file_and_no_network(page: Path) -> None:
    links = Links()
    links.feed(page.read_text())
    assert links.targets
    assert all(target.startswith(("data:image/png;base64,", "#")) for target in links.targets)
    assert "@import" not in page.read_text()


def test_the_page_shows_tables_figures_pictures_and_configs(page: Path) -> None:
    text = page.read_text()
    assert text.count("<svg") == len(FIGURES)
    assert text.count('src="data:image/png;base64,') == 10 * 5
    assert "a dog &lt;b&gt;" in text
    assert "output_dir: runs/&lt;both&gt;" in text
    assert "cgrpo compare x.yaml" in text
    assert "<b>Customized-GRPO</b>" in text
    assert 'name="viewport"' in text
    assert "@media print" in text
    files = {path.stem: path for path in (page.parent / "figures").iterdir()}
    assert set(files) == FIGURES
    for path in files.values():
        with Image.open(path) as image:
            assert min(image.size) > 300


def test_shares_lead_then_pictures_with_marks_then_similarities(page: Path) -> None:
    text = page.read_text()
    order = ("Right pictures, and copies", 'id="right-plane"', 'id="right-over-training"')
    order += ('id="pictures"', 'id="similarities"', 'id="plane"', 'id="details"', 'id="conflicts"')
    places = [text.index(word) for word in order]
    assert places == sorted(places)
    rows = text[text.index("<tbody>", text.index('id="pictures"')) :].split("</tr>")[:10]
    words = re.compile(r'<span class="mark"[^>]*>(\w+)</span>')
    cells = [[words.findall(cell) for cell in row.split("</td>")] for row in rows]
    # Columns: reference, prompt, base, two methods, ground truth.
    assert cells[0][:6] == [[], [], *[["other"]] * 4]
    assert cells[1][:6] == [[]] * 6
    assert cells[9][:6] == [[], [], *[["copy", "missed"]] * 4]
    assert text.count("</span> another subject") == 1


def test_data_that_do_not_know_what_is_right_have_no_marks(tmp_path: Path) -> None:
    save_pictures(tmp_path)
    known = made_up()

    def without(judged: Judgement) -> Judgement:
        return Judgement(columns={k: v for k, v in judged.columns.items() if k not in SHARES})

    anchors = {name: without(judged) for name, judged in known.yardstick.anchors.items()}
    assert known.yardstick.base is not None
    results = made_up(
        yardstick=replace(known.yardstick, anchors=anchors, base=without(known.yardstick.base)),
        cells=[replace(cell, judgement=without(cell.judgement), curve={}) for cell in known.cells],
    )
    text = write_report(results, tmp_path, "", study_pictures(results, tmp_path)).read_text()
    assert 'class="mark"' not in text
    assert 'id="right' not in text
    assert 'href="#right"' not in text
    assert text.index('id="pictures"') < text.index('id="plane"')


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_a_phone_shows_all_of_it(page: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        for width in (390, 1280):
            tab = browser.new_page(viewport={"width": width, "height": 844})
            tab.goto(page.as_uri())
            tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            right = tab.evaluate(
                """() => Math.max(...[...document.querySelectorAll('body *')]
                    .filter(e => !e.parentElement.closest('.scroll, svg, pre'))
                    .map(e => e.getBoundingClientRect().right))"""
            )
            assert right <= width  # also what a box without a scroll bar would cut off
            figures = [box.bounding_box()["width"] for box in tab.locator("figure svg").all()]
            assert 300 < min(figures) <= max(figures) <= width
        browser.close()


@pytest.mark.slow
def test_a_second_writing_gives_the_same_bytes(page: Path) -> None:
    before = {p: p.read_bytes() for p in page.parent.rglob("*") if p.is_file()}
    results = made_up()
    write_report(results, page.parent, "cgrpo compare x.yaml", study_pictures(results, page.parent))
    assert {p: p.read_bytes() for p in page.parent.rglob("*") if p.is_file()} == before


def test_a_bare_run_still_has_a_report(tmp_path: Path) -> None:
    """Nothing but scores: no curve, no advantages, no ground truth, one seed, one objective."""
    full = made_up()
    scores = {"columns": {"dinov2": [0.5, 0.6]}}
    bare = Cell(method="naive", seed=0, judgement=Judgement(**scores), config=full.cells[0].config)
    yardstick = Yardstick(
        set="validation",
        items=(Item(subject="", prompt_index=0, prompt="a dog"),) * 2,
        objectives={"dinov2": "identity"},
        anchors={"copy": Judgement(**scores)},
        base=Judgement(**scores),
    )
    labels = {"naive": "mine"}
    one = Results(
        name="x", config="", yardstick=yardstick, labels=labels, main="naive", cells=[bare]
    )
    page = write_report(one, tmp_path, "cgrpo report mine", {}).read_text()
    assert "Pictures</h2>" not in page
    assert "nan" not in markdown(one)
    assert "2 validation examples" in page
    assert "held-out" not in page


def test_the_bonus_shown_is_the_one_the_run_got() -> None:
    results = made_up()
    part = _advantages_and_bonus(results.of("both")[0])
    assert part is not None
    advantages, bonus = part
    assert len(advantages) == 21  # three of the first twelve could not be scored
    for group in (slice(0, 9), slice(9, 21)):  # the shipped recipe centres it, group by group
        sars = synergy_bonus(advantages[group])
        assert torch.allclose(bonus[group], sars - sars.mean(), atol=1e-6)


def test_two_seeds_are_drawn_without_an_interval() -> None:
    results = made_up()
    for seeds, bands in ((3, 2), (2, 0), (1, 0)):
        some = replace(results, cells=[c for c in results.cells if c.seed < seeds])
        curves, plane = (
            figures.figures(some)[name].axes[0] for name in ("learning-curves", "plane")
        )
        assert len(curves.collections) == bands
        bars = [bar for bar in plane.containers if bar.has_xerr]
        assert len(bars) == (0 if seeds == 2 else 2)  # of one, over the examples


def test_a_model_without_scores_is_left_out_of_the_planes() -> None:
    results = made_up()
    base = results.yardstick.base
    assert base is not None
    unknown: list[float | None] = [None] * 10
    dead = {"dinov2": unknown, "subject_right": unknown}
    base = replace(base, columns=base.columns | dead)
    drawn = figures.figures(replace(results, yardstick=replace(results.yardstick, base=base)))
    for name in ("plane", "right-plane"):
        texts = [text.get_text() for text in drawn[name].axes[0].texts]
        assert "base" not in texts
        assert "ground truth" in texts
    copies = {"copy": results.yardstick.anchors["copy"]}
    bare = replace(results.yardstick, base=base, anchors=copies)
    assert "plane" not in figures.figures(replace(results, yardstick=bare, cells=[]))


@pytest.mark.slow
def test_labels_may_have_dollars() -> None:
    label = "50 % off $a_$, $"
    for figure in figures.figures(made_up(labels={"naive": label, "both": "mine $_$"})).values():
        assert b"PNG" in figures.to_png(figure)[:8]
        figures.to_svg(figure)


def test_the_copy_gap_is_drawn_beside_the_gains_where_it_is_known() -> None:
    results = made_up()
    titles = [axes.get_title() for axes in figures.figures(results)["learning-curves"].axes]
    assert titles == ["prompt", "identity"]
    cells = [
        replace(
            c, curve=c.curve | {"copy_gap/validation": [0.1 + 0.1 * u for u in c.curve["update"]]}
        )
        for c in results.cells
    ]
    *_, gap = figures.figures(replace(results, cells=cells))["learning-curves"].axes
    assert gap.get_title() == "copy gap"
    assert gap.lines[0].get_ydata()[0] == 0  # the change since the base, as of the others


def test_a_report_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    wanted = r"^a report needs the extra packages \(.*scipy.*'customized-grpo\[report\]'$"
    with pytest.raises(ConfigError, match=wanted):
        write_report(made_up(), tmp_path, "", {})
    assert not list(tmp_path.iterdir())


def test_shares_lead_and_the_base_is_not_held_against_itself() -> None:
    first, ranking, second, change, *_ = tables(made_up())
    assert ranking.title == "Ranking"
    assert first.heads == ["", "prompt right", "subject right", "both right", "copies"]
    (base,) = (row for row in first.rows if row[0] == "base")
    assert base[1:] == ["0.600", "0.500", "0.300", "0.100"]
    (base,) = (row for row in second.rows if row[0] == "base")
    joint = [second.heads.index(f"joint {name}") for name in ("domination", "collapse")]
    assert [base[column] for column in joint] == ["", ""]
    assert change.heads[:5] == first.heads


@pytest.mark.slow
def test_hacking_alarms_stand_above_the_tables(tmp_path: Path) -> None:
    calm = {"update": [0, 10, 20, 30, 40], "hacking/dinov2": [0.0, 1.0, 0.0, 1.0, 2.0]}
    raised = calm | {"hacking/dinov2": [0.0, 1.0, 2.0, 3.0, 4.0], "hacking/clip-text": [0.0] * 5}
    results = made_up()
    assert "alarm for" not in markdown(results)  # nobody has looked
    cells = [replace(cell, alarms=calm) for cell in results.cells]
    assert "\nNo alarm for reward hacking in 6 runs.\n" in markdown(replace(results, cells=cells))
    cells[0] = replace(cells[0], alarms=calm | {"copying/clip-text": [0.0] * 5})
    assert "\nNo alarm for copying in one run.\n" in markdown(replace(results, cells=cells))
    copied = calm | {"copying/clip-text": [0.0, 1.0, 2.0, 2.0, 3.0]}
    cells[1] = replace(cells[1], alarms=copied)
    text = (
        "Copying, an evaluator fell while the copy gap rose: Customized-GRPO, seed 0, update 40 "
        "(clip-text fell, 3 validations in a row). 2 runs looked for it."
    )
    assert f"\n{text}\n" in markdown(replace(results, cells=cells))
    cells[2] = replace(cells[2], alarms=raised)  # naive, seed 1; patience is 3
    text = (
        "Reward hacking, an evaluator fell while a reward of its objective rose: naive GRPO 1:1, "
        "seed 1, update 30 (dinov2 fell, 3 validations in a row). 6 runs looked for it."
    )
    hacked = replace(results, cells=cells)
    assert f"\n{text}\n" in markdown(hacked)
    assert text in write_report(hacked, tmp_path, "cgrpo compare", {}).read_text()


def test_runs_that_end_early_shorten_the_curves(tmp_path: Path) -> None:
    results = made_up()
    short = results.cells[0]
    curve = {name: column[:2] for name, column in short.curve.items()}
    shares = {name: column[:1] for name, column in short.shares.items()}
    cells = [replace(short, curve=curve, shares=shares), *results.cells[1:]]
    page = write_report(replace(results, cells=cells), tmp_path, "cgrpo compare", {})
    assert page.read_text().count("<svg") == len(FIGURES)


@pytest.mark.slow
def test_the_report_of_one_run_begins_with_the_verdict(tmp_path: Path) -> None:
    results = made_up()
    one = replace(results, cells=[c for c in results.cells if (c.method, c.seed) == ("both", 0)])
    page = write_report(one, tmp_path, "cgrpo report", {}).read_text()
    sentence = "No difference to speak of in how many pictures show the right subject"
    assert page.index(sentence) < page.index("<svg")
    assert sentence not in write_report(results, tmp_path, "cgrpo report", {}).read_text()


def _one(results: Results) -> Results:
    """Its first run by the main method, alone, as `cgrpo report RUN` has it."""
    cells = [c for c in results.cells if (c.method, c.seed) == ("both", 0)]
    return replace(results, cells=cells, labels={"both": "tuned"})


@pytest.mark.slow
def test_the_report_of_one_run_shows_pictures_first_and_claims_no_seeds(tmp_path: Path) -> None:
    save_pictures(tmp_path)
    one = _one(made_up())
    page = write_report(one, tmp_path, "", study_pictures(one, tmp_path)).read_text()
    order = ('id="pictures"', "<svg", 'id="similarities"')
    assert [page.index(word) for word in order] == sorted(page.index(word) for word in order)
    assert page.index('id="pictures"') < page.index('id="right"')
    assert 'class="pictures few"' in page
    assert "One run, 2.0 min of training, judged on" in page
    assert "seeds" not in page.partition('id="details"')[0]
    assert "95 % interval of its change from the base over the examples" in page
    assert "identity lies copying" in page
    anchors = {n: j for n, j in one.yardstick.anchors.items() if n != "ground truth"}
    bare = replace(one, yardstick=replace(one.yardstick, anchors=anchors))
    assert "identity lies copying" not in write_report(bare, tmp_path, "", {}).read_text()


def test_one_run_has_the_error_of_its_change_and_many_that_of_their_seeds() -> None:
    results, one = made_up(), _one(made_up())
    (cell,) = one.cells
    columns = cell.judgement.columns | {"clip-text": [0.8 + 0.01 * n for n in range(10)]}
    one = replace(one, cells=[replace(cell, judgement=Judgement(columns=columns))])
    change = one.over_seeds("both", "clip-text", minus="base")
    assert change is not None
    shown = figures._with_error(one, "both", "clip-text")
    assert shown is not None
    assert shown.half_width == pytest.approx(change.half_width, abs=1e-6)
    assert shown.half_width > 0
    assert figures._with_error(results, "both", "dinov2") == results.over_seeds("both", "dinov2")


def test_weights_are_drawn_of_the_steps_that_are_trained() -> None:
    cell = made_up().cells[1]
    weights = [[1 - w, w] for w in (0.9, 0.8, 0.7, 0.6, 0.5, 0.5)]  # of the config's six steps
    cell = replace(cell, schedule=cell.schedule | {"weights": weights})
    assert figures._trained_weights(cell) == tuple(enumerate((0.9, 0.8, 0.7, 0.6, 0.5)))


def test_tables_say_where_the_interval_excludes_zero() -> None:
    results = made_up()
    cells = []
    for c in results.cells:  # each seed a little else
        score = c.judgement.tensors["dinov2"] + 0.01 * c.seed * (c.method == "both")
        columns = c.judgement.columns | {"dinov2": score.tolist()}
        cells.append(replace(c, judgement=Judgement(columns=columns)))
    by_title = {table.title: table for table in tables(replace(results, cells=cells))}
    paired = by_title["Customized-GRPO minus the others, paired by seed"]
    identity = paired.rows[0][paired.heads.index("identity")]
    assert identity == "**+0.0400 ± 0.0248**"
    same = {table.title: table for table in tables(made_up())}[paired.title]
    assert same.rows[0][same.heads.index("identity")] == "+0.0300 ± 0.0000"  # of no width
    conflicts = by_title["Samples by the signs of their advantages"]
    assert conflicts.rows[0] == ["naive GRPO 1:1", "45.0 %", "35.0 %", "20.0 %"]
    assert conflicts.rows[-1][1:] == ["50.2 %", "26.8 %", "23.0 %"]
    assert all(len(t.heads) == len(row) for t in by_title.values() for row in t.rows)
