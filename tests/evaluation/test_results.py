from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from made_up import judgement, made_up

from customized_grpo.config.names import BASE
from customized_grpo.errors import CheckpointError
from customized_grpo.evaluation.outcome import Judgement
from customized_grpo.evaluation.report.tables import tables
from customized_grpo.evaluation.results import Results, read_cell


def test_differences_are_paired_by_seed() -> None:
    results = made_up()
    difference = results.over_seeds("both", "dinov2", minus="naive")
    assert difference is not None
    assert difference.mean == pytest.approx(0.03)
    assert difference.half_width == pytest.approx(0, abs=1e-6)  # seeds and examples move both alike
    plain = results.over_seeds("both", "dinov2")
    assert plain is not None
    assert plain.half_width > 1e-3
    fewer = made_up(cells=[c for c in results.cells if (c.method, c.seed) != ("naive", 2)])
    paired = fewer.over_seeds("both", "dinov2", minus="naive")
    assert paired is not None
    assert paired.count == 2


def test_a_difference_takes_in_the_spread_of_the_examples() -> None:
    """Seeds agree, as two may by chance; half of the examples gain .1 and half lose .06."""
    results = made_up()
    base = results.yardstick.base
    assert base is not None
    moved = [b + (0.1 if row % 2 else -0.06) for row, b in enumerate(base.columns["dinov2"])]
    judged = dataclasses.replace(base, columns=base.columns | {"dinov2": moved})
    cells = [dataclasses.replace(cell, judgement=judged) for cell in results.cells]
    alike = dataclasses.replace(results, cells=cells)
    found = alike.over_seeds("both", "dinov2", minus=BASE)
    assert found is not None
    assert found.mean == pytest.approx(0.02)
    assert found.half_width == pytest.approx(1.96 * 0.08 / 10**0.5, rel=0.05)
    assert "**" not in "".join(_row(alike, "Change from the base", "Customized-GRPO"))
    one = dataclasses.replace(alike, cells=[c for c in cells if c.seed == 0])
    single = one.over_seeds("both", "dinov2", minus=BASE)
    assert single is not None
    assert single.half_width == pytest.approx(found.half_width)
    # Of one subject, the pictures are all there is.
    items = tuple(dataclasses.replace(i, subject="rex") for i in results.yardstick.items)
    rex = dataclasses.replace(alike, yardstick=dataclasses.replace(alike.yardstick, items=items))
    alone = rex.over_seeds("both", "dinov2", minus=BASE)
    assert alone is not None
    assert alone.half_width == pytest.approx(found.half_width, rel=0.05)


def _row(results: Results, title: str, label: str) -> list[str]:
    """Cells of a row, without the name's emphasis."""
    (table,) = (table for table in tables(results) if table.title == title)
    (row,) = (row for row in table.rows if row[0].strip("*") == label)
    return row[1:]


def test_shares_of_few_seeds_stay_between_0_and_1() -> None:
    results = made_up()
    cells = []
    for cell in results.cells[:4]:  # two seeds, which disagree
        column: list[float | None] = [float(row < 1 + 3 * cell.seed) for row in range(10)]
        columns = cell.judgement.columns | {"copies": column}
        judged = dataclasses.replace(cell.judgement, columns=columns)
        cells.append(dataclasses.replace(cell, judgement=judged))
    two = dataclasses.replace(results, cells=cells)
    shown = _row(two, "Right pictures, and copies", "Customized-GRPO")
    assert shown[-1] == "0.250 [0.000, 1.000]"
    assert all("**" not in cell for cell in _row(two, "Change from the base", "Customized-GRPO"))


def test_measures_against_base_and_anchors() -> None:
    results = made_up()
    values = results.yardstick.values(results.of("both")[0].judgement)
    assert values["hypervolume"] == pytest.approx(0.82 * 0.42, abs=1e-6)
    assert values["joint/domination"] == 1
    assert values["joint/collapse"] == 0
    assert values["hacking_gap/prompt"] == pytest.approx(0, abs=1e-6)
    base = results.yardstick.values(results.yardstick.models["base"])
    assert not [name for name in base if name.startswith(("hacking_gap", "joint"))]
    assert "joint/collapse" in results.yardstick.values(results.yardstick.anchors["copy"])
    worse = results.yardstick.values(results.of("naive")[0].judgement)
    assert (worse["joint/domination"], worse["joint/collapse"]) == (0, 1)


def test_the_hacking_gap_pairs_reward_and_evaluator_by_objective() -> None:
    results = made_up()
    renamed = dataclasses.replace(results.yardstick, objectives={"clip-text": "prompt"})
    other = dataclasses.replace(renamed, rewards={"dinov2": "prompt"})
    judged = judgement(0.85, 0.52)  # the evaluator's gain is .05, the rewarded model's .02
    assert renamed.values(judged)["hacking_gap/prompt"] == pytest.approx(0, abs=1e-6)
    assert other.values(judged)["hacking_gap/prompt"] == pytest.approx(0.02 - 0.05, abs=1e-6)


def test_one_objective_alone_is_enough() -> None:
    both = made_up()
    yardstick = dataclasses.replace(both.yardstick, objectives={"dinov2": "identity"})
    results = dataclasses.replace(both, yardstick=yardstick)
    values = yardstick.values(results.of("both")[0].judgement)
    assert "hypervolume" not in values
    assert values["joint/domination"] == 1
    assert "prompt" not in yardstick.leading
    lacking = dataclasses.replace(both.yardstick, objectives={"clip-text": "prompt", "x": "other"})
    assert lacking.joint(results.of("both")[0].judgement) == {}


def test_results_survive_the_file(tmp_path: Path) -> None:
    results, file = made_up(), tmp_path / "results.json"
    results.write(file)
    again = Results.read(file)
    assert again.labels == results.labels
    assert again.of("both")[1].schedule == results.of("both")[1].schedule
    mean = again.of("both")[1].judgement.means["dinov2"]
    assert mean == pytest.approx(results.of("both")[1].judgement.means["dinov2"], abs=1e-5)
    first = file.read_bytes()
    again.write(file)
    assert file.read_bytes() == first


def test_the_copy_gap_is_kept_where_every_validation_has_it(tmp_path: Path) -> None:
    score, gap = "validation/clip-text", "copy_gap/validation"
    for name in ("advantages.jsonl", "schedule.json", "config.yaml", "environment.json"):
        (tmp_path / name).write_text("{}\n")
    for gaps, kept in (([0.1, 0.4], [0.1, 0.4]), ([0.1, None], None)):
        rows = [
            {"update": u, score: 0.3} | ({} if g is None else {gap: g}) for u, g in enumerate(gaps)
        ]
        rows.insert(1, {"update": 0, "seconds/rollout": 2.0})
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        cell = read_cell(tmp_path, "x", 0, Judgement(columns={}))
        assert (cell.curve.get(gap), cell.curve[score]) == (kept, [0.3, 0.3])


def test_a_cell_knows_when_its_curve_first_passed_a_level(tmp_path: Path) -> None:
    """Seconds of all stages but validation, also of the updates between two validations."""
    share = "validation/share/both_right"
    rows = [
        {"update": 0, share: 0.1, "seconds/rollout": 0.5, "seconds/validation": 50.0},
        {"update": 1, "seconds/rollout": 2.0, "seconds/update": 1.0},
        {"update": 2, share: 0.4, "seconds/update": 1.0, "seconds/validation": 9.0},
        {"update": 3, "seconds/rollout": 2.0, "seconds/balance": 4.0},
        {"update": 4, share: 0.3, "seconds/update": 1.0, "seconds/validation": 9.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name in ("advantages.jsonl", "schedule.json", "config.yaml", "environment.json"):
        (tmp_path / name).write_text("{}\n")
    cell = read_cell(tmp_path, "x", 0, Judgement(columns={}))
    assert cell.curve == {"update": [0, 2, 4], share: [0.1, 0.4, 0.3], "seconds": [0.5, 4.5, 11.5]}
    assert cell.seconds == 11.5
    assert cell.first_passes(share, 0.1) == (0, 0.5)
    assert cell.first_passes(share, 0.3) == (2, 4.5)
    assert cell.first_passes(share, 0.4) == (2, 4.5)
    assert cell.first_passes(share, 0.5) is None
    assert cell.first_passes("validation/share/copies", 0.0) is None


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"RUN: {tmp_path} is not the folder of a run"):
        read_cell(tmp_path, "x", 0, Judgement(columns={}))


def test_an_alarm_that_begins_late_hides_no_other(tmp_path: Path) -> None:
    """As in a run that was resumed by a version with one more."""
    rows = [{"update": u, "hacking/dinov2": float(n)} for u, n in ((0, 0), (20, 3), (40, 4))]
    rows += [{"update": 50}, {"update": 60, "hacking/dinov2": 0.0, "copying/clip-text": 1.0}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files = {"metrics.jsonl": lines, "advantages.jsonl": '{"rollout": 0}\n', "config.yaml": ""}
    for name, text in (files | dict.fromkeys(("schedule.json", "environment.json"), "{}")).items():
        (tmp_path / name).write_text(text)
    alarms = read_cell(tmp_path, "m", 0, Judgement(columns={})).alarms
    assert alarms["update"] == [0, 20, 40, 60]
    assert alarms["hacking/dinov2"] == [0, 3, 4, 0]
    assert alarms["copying/clip-text"] == [0, 0, 0, 1]
