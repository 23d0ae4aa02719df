from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from made_up import judgement, made_up

from customized_grpo.errors import CheckpointError
from customized_grpo.evaluation.outcome import Judgement
from customized_grpo.evaluation.results import Results, read_cell


def test_differences_are_paired_by_seed() -> None:
    results = made_up()
    difference = results.over_seeds("both", "dinov2", minus="naive")
    assert difference is not None
    assert difference.mean == pytest.approx(0.03)
    assert difference.half_width == pytest.approx(0, abs=1e-6)  # seeds move both alike
    plain = results.over_seeds("both", "dinov2")
    assert plain is not None
    assert plain.half_width > 1e-3
    fewer = made_up(cells=[c for c in results.cells if (c.method, c.seed) != ("naive", 2)])
    paired = fewer.over_seeds("both", "dinov2", minus="naive")
    assert paired is not None
    assert paired.count == 2


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


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"RUN: {tmp_path} is not the folder of a run"):
        read_cell(tmp_path, "x", 0, Judgement(columns={}))
