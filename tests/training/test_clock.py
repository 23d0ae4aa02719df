"""What comes by updates or by minutes, with a clock that the test moves."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import pytest
import torch
from chaos import content, small_run
from helpers import changed

from customized_grpo.config import RunConfig, TrainConfig, load_config
from customized_grpo.runs.checkpoint import checkpoint_folders
from customized_grpo.runs.log import RunLog
from customized_grpo.runs.ranks import Ranks
from customized_grpo.training import clock as clock_module
from customized_grpo.training.clock import Clock
from customized_grpo.training.session import Session
from customized_grpo.training.train import train


class Time:
    """Seconds that pass when they are told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def saved(updates: int, minutes: float, length: float, total: int = 12) -> list[int]:
    """Updates, ``length`` minutes each, after which something comes."""
    time, found = Time(), []
    clock = Clock(updates, minutes, now=time)
    for update in range(1, total + 1):
        time.now += 60 * length
        if clock.is_due(update - 1, update):
            found.append(update)
            clock.restart()
    return found


@pytest.mark.parametrize(
    ("updates", "minutes", "length", "expected"),
    [
        (5, 0, 100, [5, 10]),  # by updates alone
        (0, 0, 100, []),
        (0, 15, 5, [3, 6, 9, 12]),  # 15 minutes are not exceeded
        (0, 15, 4, [3, 6, 9, 12]),  # after 16 it would be too late
        (0, 15, 20, list(range(1, 13))),  # an update is longer: after each
        (5, 15, 4, [3, 5, 8, 10]),  # whichever comes first, and minutes begin again
        (5, 15, 0.1, [5, 10]),
    ],
)
def test_updates_or_minutes(
    updates: int, minutes: float, length: float, expected: list[int]
) -> None:
    assert saved(updates, minutes, length) == expected


def test_what_is_lost_is_at_most_the_minutes_or_an_update() -> None:
    for length in (0.2, 1, 3, 7.5, 14, 15, 40):
        points = [0, *saved(0, 15, length, 200)]
        gaps = [length * (b - a) for a, b in itertools.pairwise(points)]
        assert max(gaps) <= max(15, length) + 1e-9
        assert min(gaps) >= max(15 - length, length) - 1e-9  # and not without need


def test_the_first_process_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([True, False])
    monkeypatch.setattr(Ranks, "broadcast", lambda *_: next(answers))
    time = Time()
    clock = Clock(0, 15, Ranks(rank=1, world_size=2), time)
    assert clock.is_due(0, 1)  # though no second has passed here
    time.now += 3600
    assert not clock.is_due(1, 2)


@pytest.mark.parametrize(
    ("flags", "minutes", "saves"),
    [
        ({}, (60, 15), True),
        ({"save_every": 0}, (60, 0), False),  # of studies: none
        ({"sample_every": 0}, (0, 15), True),
        ({"save_every": 0, "save_minutes": 5}, (60, 5), True),
        ({"save_every": 0, "save_minutes": 0}, (60, 0), False),
        ({"save_minutes": 0, "sample_minutes": 1.5}, (1.5, 0), True),
    ],
)
def test_none_by_updates_is_none_unless_minutes_are_set(
    flags: dict[str, float], minutes: tuple[float, float], saves: bool
) -> None:
    words = [f"--train.{name}={value}" for name, value in flags.items()]
    config: TrainConfig = load_config("configs/emoji.yaml", words).train
    assert (config.minutes("sample"), config.minutes("save")) == minutes
    assert config.saves is saves


@pytest.mark.slow
def test_a_run_is_saved_and_shown_by_minutes_and_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts of 23 minutes each: with the default, none of them can be lost."""
    often = ("--train.save_every", "50", "--train.sample_every", "50")
    flags = ("--train.keep_checkpoints", "9", "--evaluation.validate_every", "0", *often)
    off = ("--train.save_minutes", "0", "--train.sample_minutes", "0")
    quiet = train(small_run(tmp_path / "quiet", "run", 6, *flags, *off))
    time, after_update = Time(), Session._after_update

    def slow(self: Session, metrics: dict[str, float]) -> None:
        time.now += 700
        after_update(self, metrics)

    monkeypatch.setattr(Session, "_after_update", slow)
    monkeypatch.setattr(
        "customized_grpo.training.session.Clock",
        lambda *values: clock_module.Clock(*values, now=time),
    )
    run = train(small_run(tmp_path / "timed", "run", 6, *flags))
    assert [folder.name for folder in checkpoint_folders(run)] == ["000002", "000004", "000006"]
    assert [path.stem for path in sorted((run / "samples").iterdir())] == [
        "000000", "000005", "000006"
    ]  # fmt: skip
    same, other = (
        {n: c for n, c in content(folder).items() if not n.startswith(("checkpoints", "samples"))}
        for folder in (quiet, run)
    )
    assert same == other


def test_a_line_of_the_log_comes_each_minute(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    time = Time()
    monkeypatch.setattr("customized_grpo.runs.log.time.monotonic", time)
    config = changed(tiny_config, train={"num_updates": 99})
    log = RunLog(Path(config.output_dir, "log"), config, torch.device("cpu"))
    with caplog.at_level(logging.INFO, logger="customized_grpo"), log.progress(0):
        for update in range(1, 14):
            time.now += 4 if update < 8 else 200
            log.row(update, {"reward/dinov2/mean": 0.5, "reward/dinov2/std": 0.1})
    said = [r.getMessage().split()[1] for r in caplog.records if "/update" in r.getMessage()]
    assert "  identity dinov2 0.500  " in caplog.text  # named as by `cgrpo watch`
    assert said == ["1/99", "8/99", "9/99", "10/99", "11/99", "12/99", "13/99"]
