"""What a run folder tells of a run: how far it is, how fast, how well, and in which state."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from customized_grpo.config import read_mapping
from customized_grpo.errors import CheckpointError
from customized_grpo.runs.alarms import ALARMS, counts
from customized_grpo.runs.files import (
    CONFIG,
    FAILURES,
    MetricsReader,
    check_run,
    checkpoint_folders,
    finished_updates,
    what_awaited,
    why_stopped,
)
from customized_grpo.runs.works import does_it_work

Row = Mapping[str, Any]

_RECENT = 10  # rollouts that a moving average is of
_RARE = ("validation", "checkpoint", "samples")  # stages that only some updates have
_SHARES = (
    "share/both_positive", "share/identity_only", "share/prompt_only", "share/both_negative"
)  # fmt: skip
_POLICY = ("loss", "kl", "clip_fraction", "grad_norm", "mismatch")
_PATIENCE, _LEAST_PATIENCE = 4, 60.0  # times the longest update so far; seconds
_TREND = 64  # points of a curve


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardCurve:
    """Means over the images of each rollout: of a reward, or of the copy gap."""

    name: str
    objective: str
    last: float
    recent: float
    """Mean of the last ten rollouts."""
    trend: list[float]
    """From the first rollout to the last, at most 64 means of as many rollouts each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationScore:
    """A validation score."""

    last: float
    base: float | None
    """Before the first update; None: not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """All that is known of a run at one moment."""

    run: str
    state: Literal["waiting", "starting", "running", "stalled", "stopped", "finished"]
    why: str | None = None
    """What has stopped it, and how it goes on."""
    waits_for: str | None = None
    """People whose votes it waits for, where they can give them, and how many have."""
    update: int = 0
    num_updates: int = 0
    silent: float = 0.0
    """Seconds since the last line of the log; before the first one, since the run began."""
    patience: float = _LEAST_PATIENCE
    """Seconds after which a silent run counts as stalled."""
    seconds_left: float | None = None
    seconds_per_update: float | None = None
    images_per_second: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    """Shares of the time of an update."""
    rewards: list[RewardCurve] = field(default_factory=list)
    copying: RewardCurve | None = None
    """The copy gap, of identity rewards that know where the subject is."""
    shares: dict[str, float] = field(default_factory=dict)
    """What part of the last ten rollouts' samples has which signs of the two advantages."""
    policy: dict[str, float] = field(default_factory=dict)
    """Means of the last rollout's updates."""
    judges: dict[str, dict[str, float]] = field(default_factory=dict)
    """Reward behind an endpoint -> its ``requests``, and their ``cost`` where prices are known."""
    validated: int | None = None
    """Update of the last validation scores."""
    validation: dict[str, ValidationScore] = field(default_factory=dict)
    works: str = ""
    """Whether the objectives have risen beyond their error, by that validation, and if not what to
    change; '' = not known."""
    checkpoint: int | None = None
    """Update of the newest one."""
    checkpoint_age: float | None = None
    """Seconds."""
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What the config of a run says about its arithmetic."""

    num_updates: int
    inner_updates: int
    num_prompts: int
    num_images: int
    """In a rollout."""
    objectives: dict[str, str]
    """Reward, by its name or else its type -> what it measures."""
    patience: int
    """Validations in a row that raise an alarm."""
    begun: float

    @classmethod
    def read(cls, file: Path) -> _Plan:
        raw = read_mapping(str(file), "RUN")  # plugs of the run need not be installed here
        prompts = raw["rollout"]["prompts_per_rollout"]
        return cls(
            num_updates=raw["train"]["num_updates"],
            inner_updates=raw["train"]["inner_updates"],
            num_prompts=prompts,
            num_images=prompts * raw["rollout"]["group_size"],
            objectives={r.get("name") or r["type"]: r["objective"] for r in raw["rewards"]},
            patience=raw.get("faults", {}).get("hacking_patience", 0),  # older runs know none
            begun=file.stat().st_mtime,
        )


class Watcher:
    """Reads a run folder again and again; it writes nothing there and takes no lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metrics = MetricsReader(folder)

    def look(self) -> Facts:
        """What is known now.

        Raises:
            CheckpointError: if the folder holds something else than a run.
            OSError: if it cannot be read.
        """
        if self._folder.exists() and not self._folder.is_dir():
            raise CheckpointError(f"RUN must be the folder of a run, got the file {self._folder}")
        if not (self._folder / CONFIG).exists():
            return Facts(run=str(self._folder), state="waiting")
        check_run(self._folder)
        plan = _Plan.read(self._folder / CONFIG)
        self._metrics.read()
        rows = self._metrics.rows
        updates = [row for row in rows if row["update"]]
        recent = updates[-_RECENT * plan.inner_updates :]
        silent = max(0.0, time.time() - max(self._metrics.written or 0.0, plan.begun))
        longest = max((sum(_seconds(row).values()) for row in updates), default=0.0)
        patience = max(_LEAST_PATIENCE, _PATIENCE * longest)
        finished = finished_updates(self._folder) == plan.num_updates  # not yet, if made longer
        why, awaited = why_stopped(self._folder), what_awaited(self._folder)
        checkpoint, checkpoint_age = self._checkpoint()
        validated = [row for row in rows if _scores(row)]
        return Facts(
            run=str(self._folder),
            state="finished" if finished
            else "stopped" if why
            else "starting" if not updates
            else "stalled" if silent > patience and not awaited
            else "running",
            why=why,
            waits_for=awaited,
            update=updates[-1]["update"] if updates else 0,
            num_updates=plan.num_updates,
            silent=silent,
            patience=patience,
            **_speed(updates, plan),
            rewards=_rewards(updates, plan),
            copying=_curve(updates, "copy_gap", "copy gap", "identity"),
            shares=_means(recent, _SHARES),
            policy=_means(updates[-plan.inner_updates :], _POLICY),
            judges=_judges(updates[-plan.inner_updates :]),
            validated=validated[-1]["update"] if validated else None,
            validation=_validation(validated),
            works=does_it_work(validated[-1]) if validated else "",
            checkpoint=checkpoint,
            checkpoint_age=checkpoint_age,
            warnings=_alarms(validated, plan) + _warnings(recent, plan, self._folder),
        )  # fmt: skip

    def _checkpoint(self) -> tuple[int | None, float | None]:
        folders = checkpoint_folders(self._folder)
        if not folders:
            return None, None
        try:
            age = max(0.0, time.time() - folders[-1].stat().st_mtime)
        except FileNotFoundError:  # outdated, and deleted just now
            age = None
        return int(folders[-1].name), age


def _seconds(row: Row) -> dict[str, float]:
    return {n.removeprefix("seconds/"): v for n, v in row.items() if n.startswith("seconds/")}


def _speed(updates: Sequence[Row], plan: _Plan) -> dict[str, Any]:
    """The pace of the last whole rollouts but the first one, which compiles and fills caches."""
    whole = updates[: len(updates) // plan.inner_updates * plan.inner_updates]
    warm = whole[plan.inner_updates :] or whole
    recent = warm[-_RECENT * plan.inner_updates :]
    stages: dict[str, float] = {}
    for name in dict.fromkeys(name for row in warm for name in _seconds(row)):
        rows = warm if name in _RARE else recent
        stages[name] = sum(_seconds(row).get(name, 0.0) for row in rows) / len(rows)
    pace = sum(stages.values())
    if not pace:
        return {}
    return {
        "seconds_per_update": pace,
        "seconds_left": pace * max(0, plan.num_updates - updates[-1]["update"]),
        "images_per_second": plan.num_images / plan.inner_updates / pace,
        "stages": {name: seconds / pace for name, seconds in stages.items()},
    }


def _series(rows: Sequence[Row], name: str) -> list[float]:
    found = (row.get(name) for row in rows)
    return [value for value in found if value is not None and math.isfinite(value)]


def _last(rows: Sequence[Row], name: str) -> float:
    return (_series(rows, name) or [0.0])[-1]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def binned(values: Sequence[float], most: int) -> list[float]:
    """Means of at most ``most`` stretches of equal length."""
    count = min(most, len(values))
    edges = [i * len(values) // count for i in range(count + 1)] if count else []
    return [_mean(values[a:b]) for a, b in pairwise(edges)]


def _rewards(updates: Sequence[Row], plan: _Plan) -> list[RewardCurve]:
    """Those of the log: one by an import path is called there as its class says."""
    some = _RECENT * plan.inner_updates
    columns = dict.fromkeys(c for row in (*updates[:some], *updates[-some:]) for c in row)
    start, end = "reward/", "/mean"
    columns = [c for c in columns if c.startswith(start) and c.endswith(end)]
    names = [column.removeprefix(start).removesuffix(end) for column in columns]
    nameless = iter([o for label, o in plan.objectives.items() if label not in names])
    curves = (
        _curve(updates, column, name, plan.objectives.get(name) or next(nameless, ""))
        for column, name in zip(columns, names, strict=True)
    )
    return sorted((c for c in curves if c is not None), key=lambda reward: reward.objective)


def _judges(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for column, total in ((column, total) for row in rows for column, total in row.items()):
        start, _, what = column.rpartition("/")
        if start.startswith("reward/") and what in ("requests", "cost"):
            found.setdefault(start.removeprefix("reward/"), {})[what] = total
    return found


def _curve(updates: Sequence[Row], column: str, name: str, objective: str) -> RewardCurve | None:
    values = _series(updates, column)
    if not values:
        return None
    return RewardCurve(
        name=name,
        objective=objective,
        last=values[-1],
        recent=_mean(values[-_RECENT:]),
        trend=binned(values, _TREND),
    )


def _means(rows: Sequence[Row], names: Iterable[str]) -> dict[str, float]:
    series = {name: _series(rows, name) for name in names}
    return {name: _mean(values) for name, values in series.items() if values}


def _scores(row: Row) -> dict[str, float]:
    start = "validation/"
    return {n.removeprefix(start): v for n, v in row.items() if n.startswith(start)}


def _validation(validated: Sequence[Row]) -> dict[str, ValidationScore]:
    if not validated:
        return {}
    base = _scores(validated[0]) if validated[0]["update"] == 0 else {}
    last = _scores(validated[-1])
    return {name: ValidationScore(last=value, base=base.get(name)) for name, value in last.items()}


def _alarms(validated: Sequence[Row], plan: _Plan) -> list[str]:
    """A warning for every evaluator that has raised an alarm by the last validation."""
    found = []
    for (kind, evaluator), count in counts(validated[-1] if validated else {}).items():
        if count >= plan.patience:
            scores = _series(validated, f"validation/{evaluator}")
            found.append(
                f"{ALARMS[kind].name}: {evaluator} is {max(scores) - scores[-1]:.4f} below its "
                f"best while {ALARMS[kind].rise} has risen, {count:.0f} validations in a row"
            )
    return found


def _warnings(recent: Sequence[Row], plan: _Plan, run: Path) -> list[str]:
    found = []
    if skipped := sum(bool(row.get("skipped_updates")) for row in recent):
        dumps = sorted((run / FAILURES).glob("*"))
        replay = f"; `cgrpo replay {shlex.quote(str(dumps[-1]))}` shows it again" if dumps else ""
        found.append(
            f"{skipped} of the last {len(recent)} updates skipped, without finite gradient{replay}"
        )
    if lost := _last(recent, "invalid_samples"):
        found.append(f"{lost:.0f} of the last rollout's {plan.num_images} images not scored")
    if (flat := _last(recent, "zero_variance_groups")) > plan.num_prompts / 2:
        found.append(
            f"{flat:.0f} of the last rollout's {plan.num_prompts} groups have equal scores: "
            "nothing to learn from"
        )
    clipped = _series(recent, "clip_fraction")
    if clipped and _mean(clipped) > 0.5:
        found.append(
            f"{_mean(clipped):.0%} of the gradient is clipped away: lower train.learning_rate or "
            "train.inner_updates"
        )
    if fitted := _last(recent, "micro_batch_size"):
        found.append(f"out of memory: micro-batches halved to {fitted:.0f} pairs")
    return found
