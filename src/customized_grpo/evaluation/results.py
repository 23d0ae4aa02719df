"""Results of one or several runs: what is kept of them, and the statistics over seeds.

A study keeps everything its tables and figures need in one ``results.json``; the run folders may
go. Judgements are rounded to five decimals when they are written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from customized_grpo.errors import CheckpointError
from customized_grpo.evaluation.measures import hypervolume, joint_rates
from customized_grpo.types import Judgement

# Anchors: the reference itself, the ground truth, the ground truth of another example.
COPY, TRUTH, CHANCE = "copy", "ground truth", "unrelated"
BASE = "base"
REFERENCE = "reference"

Split = Literal["held_out", "validation"]

_SHARES = ("share/conflicted", "share/both_positive", "share/both_negative")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is kept of one run."""

    method: str
    seed: int
    judgement: Judgement
    config: str
    """The resolved YAML."""
    curve: dict[str, list[float]] = field(default_factory=dict)
    """``update`` and the validation scores at these updates."""
    shares: dict[str, list[float]] = field(default_factory=dict)
    """``update`` and the shares of conflicted, both-positive and both-negative samples."""
    advantages: dict[str, list[float | None]] = field(default_factory=dict)
    """Objective -> advantages of the first rollout's samples; no method has learnt by then."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """Noise levels and weights of the denoising steps."""
    seconds: float = 0.0
    """Wall time of training, without evaluation."""
    environment: dict[str, str] = field(default_factory=dict)
    """Machine and versions."""


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What pictures are judged against: examples, evaluators, anchors and base."""

    split: Split
    objectives: dict[str, str]
    """Evaluator -> the objective it measures."""
    rewards: dict[str, str]
    """Reward -> the objective it measures; their scores are columns called ``reward/LABEL``."""
    prompts: list[str]
    """Of the examples in the pictures."""
    models: dict[str, Judgement]
    """The anchors (the reference itself, the ground truth, the ground truth of another example,
    which fits nothing) and the base."""

    @property
    def base(self) -> Judgement:
        """The untuned generator."""
        return self.models[BASE]

    @property
    def count(self) -> int:
        """Examples."""
        return len(next(iter(self.base.columns.values())))

    def describe(self) -> str:
        """``512 held-out examples``."""
        return f"{self.count} {self.split.replace('_', '-')} examples"

    def agrees_with(self, other: Yardstick) -> bool:
        """The same examples, as far as they are kept, and the same evaluators."""
        mine, theirs = (
            (y.split, y.count, y.prompts, y.objectives, y.rewards) for y in (self, other)
        )
        return mine == theirs

    def evaluator(self, objective: str) -> str | None:
        """The first evaluator of an objective, if there is one."""
        return _first(self.objectives, objective)

    def reward(self, objective: str) -> str | None:
        """The first reward of an objective, if there is one."""
        return _first(self.rewards, objective)

    def point(self, judgement: Judgement) -> tuple[float, float] | None:
        """(prompt, identity) means, if both are measured."""
        names = self.evaluator("prompt"), self.evaluator("identity")
        if names[0] is None or names[1] is None:
            return None
        return judgement.means[names[0]], judgement.means[names[1]]

    def values(self, judgement: Judgement) -> dict[str, float]:
        """All measures of one judgement, those against base and anchors included."""
        values = judgement.means | judgement.numbers
        scores = self._scores(judgement), self._scores(self.base)
        values["joint_domination"], values["joint_collapse"] = joint_rates(*scores)
        point = self.point(judgement)
        chance = self.point(self.models[CHANCE]) if CHANCE in self.models else None
        if point is not None and chance is not None:
            values["hypervolume"] = hypervolume([point], chance)
        return values | self._hacking_gaps(judgement)

    def _hacking_gaps(self, judgement: Judgement) -> dict[str, float]:
        """Gain over the base by the reward minus gain by the evaluator; not of anchors and base."""
        if judgement in self.models.values():
            return {}
        gaps: dict[str, float] = {}
        for objective in dict.fromkeys(self.objectives.values()):
            pair = self.reward(objective), self.evaluator(objective)
            if pair[0] is not None and f"reward/{pair[0]}" in judgement.columns:
                names = f"reward/{pair[0]}", str(pair[1])
                gains = [judgement.means[name] - self.base.means[name] for name in names]
                gaps[f"hacking_gap/{objective}"] = gains[0] - gains[1]
        return gaps

    def _scores(self, judgement: Judgement) -> Tensor:
        """``[B, N]`` by the first evaluator of every objective."""
        objectives = dict.fromkeys(self.objectives.values())
        return torch.stack([judgement.column(str(self.evaluator(o))) for o in objectives], 1)


def _first(names: Mapping[str, str], objective: str) -> str | None:
    """The first name that measures an objective."""
    return next((name for name, measured in names.items() if measured == objective), None)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Cells of a study or of any runs, and what they are judged against."""

    name: str
    yardstick: Yardstick
    labels: dict[str, str]
    """Method -> what tables call it, in their order."""
    main: str
    """The method that the others are compared with."""
    cells: list[Cell]

    def of(self, method: str) -> dict[int, Cell]:
        """Seed -> cell."""
        return {cell.seed: cell for cell in self.cells if cell.method == method}

    @property
    def methods(self) -> list[str]:
        """Those that have cells, in the order of the tables."""
        return [method for method in self.labels if self.of(method)]

    def over_seeds(self, method: str, measure: str, minus: str | None = None) -> Interval | None:
        """A measure's mean over seeds, or its paired difference to another method or the base."""
        own = {seed: self._value(cell.judgement, measure) for seed, cell in self.of(method).items()}
        if minus is None:
            other = dict.fromkeys(own, 0.0)
        elif minus == BASE:
            other = dict.fromkeys(own, self._value(self.yardstick.base, measure))
        else:
            cells = self.of(minus)
            other = {seed: self._value(cell.judgement, measure) for seed, cell in cells.items()}
        numbers = [own[s] - other[s] for s in sorted(own.keys() & other.keys())]
        numbers = [number for number in numbers if not math.isnan(number)]
        return Interval.of(numbers) if numbers else None

    def _value(self, judgement: Judgement, measure: str) -> float:
        return self.yardstick.values(judgement).get(measure, math.nan)

    def write(self, file: Path, write: Callable[[Path, str], None]) -> None:
        """Writes JSON by the function given."""
        yardstick = self.yardstick
        content = {
            "name": self.name,
            "split": yardstick.split,
            "objectives": yardstick.objectives,
            "rewards": yardstick.rewards,
            "prompts": yardstick.prompts,
            "baselines": {name: asdict(judged) for name, judged in yardstick.models.items()},
            "labels": self.labels,
            "main": self.main,
            "cells": [asdict(cell) for cell in self.cells],
        }
        write(file, json.dumps(_rounded(content), separators=(",", ":")) + "\n")

    @classmethod
    def read(cls, file: Path) -> Results:
        """Reads what ``write`` wrote.

        Raises:
            CheckpointError: if the file is missing or holds something else.
        """
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            return cls(
                name=raw["name"],
                yardstick=Yardstick(
                    split=raw["split"],
                    objectives=raw["objectives"],
                    rewards=raw["rewards"],
                    prompts=raw["prompts"],
                    models={n: Judgement(**fields) for n, fields in raw["baselines"].items()},
                ),
                labels=raw["labels"],
                main=raw["main"],
                cells=[
                    Cell(**{**cell, "judgement": Judgement(**cell["judgement"])})
                    for cell in raw["cells"]
                ],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file}: must be results of a study, cannot be read ({error!r}); remove it and "
                "run cgrpo compare again"
            ) from error


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with the half-width of its 95 % confidence interval (Student's t)."""

    mean: float
    half_width: float
    """NaN for a single seed."""
    count: int

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Interval:
        """Of one number per seed."""
        from scipy.stats import t

        values = torch.tensor(numbers, dtype=torch.float64)
        count = len(values)
        half = math.nan
        if count > 1:
            half = float(t.ppf(0.975, count - 1)) * (values.std() / count**0.5).item()
        return cls(values.mean().item(), half, count)

    def text(self, digits: int = 4, sign: bool = False) -> str:
        """``mean ± half-width``."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if math.isnan(self.half_width) else f"{mean} ± {self.half_width:.{digits}f}"

    @property
    def excludes_zero(self) -> bool:
        """True if the whole interval lies on one side of 0."""
        return abs(self.mean) > self.half_width


def read_cell(folder: Path, method: str, seed: int, judgement: Judgement) -> Cell:
    """What is kept of a run folder.

    Raises:
        CheckpointError: if a file of the run is missing or damaged.
    """
    try:
        rows = _lines(folder / "metrics.jsonl")
        first = _lines(folder / "advantages.jsonl")[0]
        schedule = json.loads((folder / "schedule.json").read_text(encoding="utf-8"))
        config = (folder / "config.yaml").read_text(encoding="utf-8")
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, IndexError) as error:
        raise CheckpointError(f"RUN: {folder} is not the folder of a run: {error}") from error
    names = dict.fromkeys(name for row in rows for name in row)
    scores = [name for name in names if name.startswith("validation/")]
    seconds = sum(
        value
        for row in rows
        for name, value in row.items()
        if name.startswith("seconds/") and name != "seconds/validation"
    )
    return Cell(
        method=method,
        seed=seed,
        judgement=judgement,
        config=config,
        curve=_series(rows, scores),
        shares=_series(rows, _SHARES),
        advantages={name: values for name, values in first.items() if name != "rollout"},
        schedule=schedule,
        seconds=seconds,
        environment=environment,
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _series(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, list[float]]:
    """Columns of the rows that have them all."""
    having = [row for row in rows if names and all(name in row for name in names)]
    return {name: [row[name] for row in having] for name in ("update", *names)} if having else {}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
