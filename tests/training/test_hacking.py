"""The alarms: against a slow count, silent on noise, and what they do to a run."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from chaos import content, small_run
from helpers import changed, metrics

from customized_grpo.config import RunConfig, load_config
from customized_grpo.errors import ConfigError, RewardError
from customized_grpo.evaluation.outcome import Judgement
from customized_grpo.evaluation.results import read_cell
from customized_grpo.rewards.base import RewardSet
from customized_grpo.runs.checkpoint import best_checkpoint, checkpoint_folders
from customized_grpo.runs.run import Run
from customized_grpo.tools.generate import open_target
from customized_grpo.tools.playground.request import list_trained
from customized_grpo.tools.watch.facts import Watcher
from customized_grpo.training import session
from customized_grpo.training.hacking import HackingAlarm
from customized_grpo.training.session import Session
from customized_grpo.training.train import train
from customized_grpo.training.validation import Validation
from customized_grpo.types import Example, RewardScores

GAP, REWARDS_GAP = "copy_gap/validation", "copy_gap/reward"
EVALUATOR, REWARD = "validation/dinov2", "validation/reward/dinov2"
OTHER, OTHER_REWARD = "validation/clip-text", "validation/reward/preference"


def scores(evaluator: np.ndarray, reward: np.ndarray) -> dict[str, torch.Tensor]:
    """Of the identity; the prompt stays as it is."""
    still = torch.zeros(len(evaluator))
    identity = {EVALUATOR: torch.tensor(evaluator), REWARD: torch.tensor(reward)}
    unknown = dict.fromkeys((GAP, REWARDS_GAP), still * math.nan)
    return identity | {OTHER: still, OTHER_REWARD: still} | unknown


def counted(evaluators: Sequence[np.ndarray], rewards: Sequence[np.ndarray]) -> list[int]:
    """The validations in a row up to each, from scratch."""

    def clear(now: np.ndarray, then: np.ndarray) -> float:
        d = now - then
        return d.mean() / (d.std(ddof=1) / len(d) ** 0.5)

    rows: list[int] = []
    for i in range(len(evaluators)):
        best = max(range(i + 1), key=lambda j: (evaluators[j].mean(), j))
        fallen = i > best and clear(evaluators[i], evaluators[best]) < -2
        hacked = fallen and clear(rewards[i], rewards[best]) > 2
        rows.append((rows[-1] if rows else 0) + 1 if hacked else 0)
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_it_counts_as_the_definition_does(tiny_config: RunConfig, seed: int) -> None:
    random = np.random.default_rng(seed)
    steps = random.normal(0, 0.15, (2, 30)).cumsum(1)
    steps += np.array([[-0.05], [0.1]]) * np.arange(30)
    series = [[0.5 + s + random.normal(0, 0.3, 20) for s in row] for row in steps]
    alarm = HackingAlarm(tiny_config)
    found = [int(alarm.look(scores(e, r))["hacking/dinov2"]) for e, r in zip(*series, strict=True)]
    assert found == counted(*series)
    assert max(found) > 3


def test_noise_alone_raises_no_alarm(tiny_config: RunConfig) -> None:
    """Nor does its selection of the best: 20 runs of 50 validations, patience 3."""
    random, raised = np.random.default_rng(0), 0
    for _ in range(20):
        alarm = HackingAlarm(tiny_config)
        for _ in range(50):
            alarm.look(scores(random.normal(0, 1, 64), random.normal(0, 1, 64)))
            raised += bool(alarm.raised())
    assert raised <= 5  # of 1000


@pytest.mark.parametrize(
    ("evaluator", "reward", "raised"), [(-0.1, 0.1, True), (-0.1, -0.1, False), (0.1, 0.1, False)]
)
def test_both_have_to_move_apart(
    tiny_config: RunConfig, evaluator: float, reward: float, raised: bool
) -> None:
    alarm, rows = HackingAlarm(tiny_config), np.arange(10) / 100
    for i in range(4):
        assert not alarm.raised()
        alarm.look(scores(evaluator * i - i * rows, reward * i + i * rows))
    assert bool(alarm.raised()) == raised
    if raised:
        wanted = (
            r"this looks like reward hacking: evaluator 'dinov2' has fallen by 0\.\d+ since its "
        )
        wanted += (
            r"best while a reward of its objective has risen by 0\.\d+, 3 validations in a row"
        )
        assert re.fullmatch(wanted, alarm.raised())


@pytest.mark.parametrize(
    ("prompt", "gap", "raised"),
    [(-0.1, 0.1, True), (-0.1, -0.1, False), (0.1, 0.1, False), (-0.1, math.nan, None)],
)
def test_copying_is_a_prompt_that_falls_while_the_copy_gap_rises(
    tiny_config: RunConfig, prompt: float, gap: float, raised: bool | None
) -> None:
    """Both of the prompt's scores fall and both of the identity's rise: nothing else sees it."""
    alarm, rows = HackingAlarm(tiny_config), np.arange(10) / 100
    counts: list[dict[str, float]] = []
    for i in range(4):
        assert not alarm.raised()
        found = scores(0.1 * i + i * rows, 0.1 * i + i * rows)
        found |= {OTHER: torch.tensor(prompt * i - i * rows), GAP: torch.tensor(gap * i + i * rows)}
        counts.append(alarm.look(found | {OTHER_REWARD: found[OTHER]}))
    assert [row["hacking/clip-text"] for row in counts] == [0, 0, 0, 0]
    assert "copying/dinov2" not in counts[-1]
    if raised is None:  # no masks
        assert "copying/clip-text" not in counts[-1]
    else:
        assert [row["copying/clip-text"] for row in counts] == [0, *np.array([1, 2, 3]) * raised]
    assert bool(alarm.raised()) == bool(raised)
    if raised:
        wanted = (
            r"this looks like copying: evaluator 'clip-text' has fallen by 0\.\d+ since its best "
            r"while the copy gap has risen by 0\.\d+, 3 validations in a row"
        )
        assert re.fullmatch(wanted, alarm.raised())


def test_its_memory_survives_json_and_what_is_not_scored(tiny_config: RunConfig) -> None:
    alarm, rows = HackingAlarm(tiny_config), np.arange(10) / 100
    first = rows.copy()
    first[3] = math.nan
    alarm.look(scores(first, rows))
    alarm.look(scores(first - 0.5 - rows, rows + 0.5 + rows**2))
    assert alarm.look(scores(first * math.nan, rows))["hacking/dinov2"] == 1  # says nothing
    again = HackingAlarm(tiny_config)
    again.state = json.loads(json.dumps(alarm.state))
    now = scores(first - 0.6 - rows, rows + 0.6 + rows**2)
    assert again.look(now) == alarm.look(now)
    assert again.look(now)["hacking/dinov2"] == 3
    fewer = scores(rows[:5], rows[:5])  # resumed with --allow-changed
    assert again.look(fewer)["hacking/dinov2"] == 0
    older = HackingAlarm(tiny_config)
    older.state = {"dinov2": alarm.state["hacking/dinov2"]}  # of a checkpoint before copying/
    assert older.look(now)["hacking/dinov2"] == 3


def test_a_gap_is_held_against_its_own_encoders(tiny_config: RunConfig) -> None:
    """The evaluators' is known first, then only the rewards', of another scale; then both."""
    alarm, rows = HackingAlarm(tiny_config), np.arange(10) / 100
    for i, known in enumerate((True, False, False, False, True)):
        gaps = {GAP: torch.full((10,), 0.1 if known else math.nan)}
        gaps |= {REWARDS_GAP: torch.tensor(0.5 + (0.1 + rows) * (i == 4))}
        found = scores(rows, rows) | gaps | {OTHER: torch.tensor(-0.1 * i - i * rows)}
        count = alarm.look(found)["copying/clip-text"]
        assert count == (i == 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"evaluation": {"validate_every": 0}},
            "faults.hacking must be warn when evaluation.validate_every is 0",
        ),
        (
            {"train": {"save_every": 0}},
            "faults.hacking must be warn or stop when train.save_every is 0, got best",
        ),
        (
            {"evaluation": {"validate_every": 3}},
            "evaluation.validate_every must be a multiple of train.inner_updates = 2 for "
            "faults.hacking best, got 3;",
        ),
    ],
)
def test_what_could_have_no_effect_is_refused(
    tiny_config: RunConfig, flags: dict[str, Any], message: str
) -> None:
    given = {"evaluation": {"validate_every": 2}, "train": {"save_every": 1}} | flags
    words = [f"--{s}.{f}={v}" for s, fields in given.items() for f, v in fields.items()]
    with pytest.raises(ConfigError, match=message):
        load_config("configs/emoji.yaml", [*words, "--faults.hacking", "best"])


class Drifting:
    """A set of rewards, or evaluators, whose scores move with the update."""

    def __init__(self, models: RewardSet, drift: Any) -> None:
        self._models, self._drift = models, drift

    def score(self, images: torch.Tensor, examples: Sequence[Example]) -> RewardScores:
        found = self._models.score(images, examples)
        return dataclasses.replace(found, scores=found.scores + self._drift())


@pytest.fixture
def _hacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards rise by .5 an update; evaluators as well up to the second, then they fall."""
    now = {"update": 0}
    validate, begin = Session._validate, Validation.__init__

    def noting(self: Session) -> dict[str, float]:
        now["update"] = self.progress.update
        return validate(self)

    def drifting(self: Validation, *arguments: Any) -> None:
        begin(self, *arguments)
        turned = Drifting(self._sets["validation"], lambda: -0.5 * abs(now["update"] - 2))
        risen = Drifting(self._sets["validation/reward"], lambda: 0.5 * now["update"])
        self._sets = {"validation": turned, "validation/reward": risen}  # pyright: ignore

    monkeypatch.setattr(Session, "_validate", noting)
    monkeypatch.setattr(Validation, "__init__", drifting)


def small(folder: Path, hacking: str, *flags: str) -> RunConfig:
    every = ("--evaluation.validate_every", "1", "--train.inner_updates", "1")
    return small_run(folder, "run", 7, *every, "--faults.hacking", hacking, *flags)


@pytest.mark.slow
@pytest.mark.usefixtures("_hacked")
def test_a_hacked_run_warns_stops_or_ends_with_its_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="customized_grpo")
    straight = train(small(tmp_path / "warn", "warn"))
    counts = [row["hacking/dinov2"] for row in metrics(straight)]
    assert counts == [0, 0, 0, 1, 2, 3, 4, 5]
    said = [r.getMessage() for r in caplog.records if "reward hacking" in r.getMessage()]
    assert [text.split(":")[0] for text in said] == ["update 5", "update 6", "update 7"]
    assert "evaluator 'dinov2' has fallen by 1." in said[0]
    (warning,) = (w for w in Watcher(straight).look().warnings if "dinov2" in w)
    assert warning.startswith("reward hacking: dinov2 is 2.")
    assert read_cell(straight, "m", 0, Judgement(columns={})).alarms["hacking/dinov2"] == counts

    stopped = small(tmp_path / "stop", "stop")
    with pytest.raises(
        RewardError, match=r"; change the recipe, or set faults\.hacking to warn; "
    ) as e:
        train(stopped)
    assert str(e.value).endswith(f"`cgrpo resume {tmp_path}/stop/run` goes on after update 5")
    assert Watcher(tmp_path / "stop" / "run").look().state == "stopped"
    again = train(changed(stopped, faults={"hacking": "warn"}), resume=True)
    assert content(again) == content(straight)

    ended = small(tmp_path / "best", "best")
    run = Run.open(train(ended))
    assert (run.updates, run.is_finished) == (2, True)
    best = best_checkpoint(run.folder)
    assert best is not None
    assert best.update == 2
    kept = content(best.folder / "weights")
    assert content(run.weights) == kept
    assert kept != content(straight / "weights")
    facts = Watcher(run.folder).look()
    assert (facts.state, facts.update) == ("stopped", 5)
    assert facts.why is not None
    assert "ended at update 5 with the weights of update 2 (the weakest evaluator: +" in facts.why
    labels = [one.label for one in list_trained(run.folder, open_target(run.folder))]
    assert labels[-1] == "kept, of update 2"
    assert "after update 2" not in labels
    before = content(run.folder)
    train(ended, resume=True)  # as a job script does
    assert content(run.folder) == before
    train(changed(ended, faults={"hacking": "warn"}), resume=True)
    assert content(run.folder) == content(straight)


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.usefixtures("_hacked")
def test_a_run_that_was_killed_at_such_an_end_comes_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at its last update, after which there is no validation to raise the alarm again."""
    config = small(tmp_path, "best", "--train.num_updates", "5")
    with monkeypatch.context() as patch:
        patch.setattr(session, "end_with_best", Mock(side_effect=Killed))
        with pytest.raises(Killed):
            train(config)
    run = Run.open(train(config, resume=True))
    assert (run.updates, run.is_finished) == (2, True)


@pytest.mark.slow
@pytest.mark.usefixtures("_hacked")
def test_the_alarm_of_a_resumed_run_remembers(tmp_path: Path) -> None:
    """Two of three validations before the break, the third after it."""
    shorter = small(tmp_path, "best", "--train.num_updates", "4")
    run = train(shorter)
    assert metrics(run)[-1]["hacking/dinov2"] == 2
    train(changed(shorter, train={"num_updates": 7}), resume=True)
    assert metrics(run)[-1]["update"] == 5
    assert [row["hacking/dinov2"] for row in metrics(run)] == [0, 0, 0, 1, 2, 3]
    assert Run.open(run).updates == 2
    assert 5 in [int(folder.name) for folder in checkpoint_folders(run)]
