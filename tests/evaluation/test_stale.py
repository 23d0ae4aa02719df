"""Numbers are those of the weights beside them, or they are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from made_runs import make_run
from made_up import made_up
from safetensors.torch import load_file, save_file

from customized_grpo.cli.main import main
from customized_grpo.cli.shared import after_pictures
from customized_grpo.config import RunConfig, load_config
from customized_grpo.config.shipped import shipped_config
from customized_grpo.errors import CheckpointError
from customized_grpo.evaluation.evaluate import current_outcome
from customized_grpo.evaluation.outcome import Outcome
from customized_grpo.files import LORA_FILE
from customized_grpo.runs.run import Run


@pytest.fixture
def run(tiny_config: RunConfig) -> Path:
    return make_run(tiny_config)


def judge(run: Path, weights: str | None) -> Outcome:
    """What ``cgrpo evaluate`` leaves."""
    results = made_up()
    own = results.of("both")[0].judgement
    outcome = Outcome(name="tuned", own=own, yardstick=results.yardstick, weights=weights)
    (run / "evaluation.json").write_text(outcome.to_json())
    return outcome


def train_on(run: Path) -> None:
    """Other weights, as after a resume."""
    weights = load_file(run / "weights" / LORA_FILE)
    save_file({name: 2 * tensor for name, tensor in weights.items()}, run / "weights" / LORA_FILE)


def test_an_evaluation_is_of_the_weights_it_judged(run: Path) -> None:
    outcome = judge(run, Run.open(run).digest)
    assert current_outcome(Run.open(run)) == outcome
    train_on(run)
    wanted = rf"RUN: {run} .* is of other ones; run `cgrpo evaluate {re.escape(str(run))}`"
    with pytest.raises(CheckpointError, match=wanted):
        current_outcome(Run.open(run))
    judge(run, None)
    with pytest.raises(CheckpointError, match="is older than the record of which"):
        current_outcome(Run.open(run))


def test_weights_are_judged_before_they_are_given_away(run: Path) -> None:
    config = load_config(shipped_config("emoji.yaml"))
    assert after_pictures(config, run)[0] == "evaluate"
    judge(run, Run.open(run).digest)
    assert after_pictures(config, run)[0] == "export"
    train_on(run)
    assert after_pictures(config, run)[0] == "evaluate"


def test_a_moved_run_is_still_the_one_that_was_judged(run: Path) -> None:
    judge(run, Run.open(run).digest)
    moved = run.rename(run.with_name("moved"))
    assert current_outcome(Run.open(moved)).weights


def test_a_report_of_other_weights_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge(run, Run.open(run).digest)
    train_on(run)
    assert main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert "must have been evaluated with the weights that it has now" in error
    assert not (run / "report.html").exists()


def test_samples_of_weights_that_are_gone_are_not_shown(run: Path) -> None:
    """Of a run that has kept earlier weights than its last."""
    (run / "samples").mkdir()
    for name in ("000000", "000040", "000060", "mine"):
        (run / "samples" / f"{name}.png").touch()
    (run / "finished.json").write_text('{"updates": 40}')
    assert Run.open(run).sample == run / "samples" / "000040.png"
    (run / "finished.json").write_text('{"updates": 60}')
    assert Run.open(run).sample == run / "samples" / "000060.png"
