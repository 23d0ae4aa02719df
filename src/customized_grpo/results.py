"""Results of one or several runs: what is kept of them, and the statistics over seeds.

A study keeps everything its tables and figures need in one ``results.json``; the run folders may
go. Judgements are rounded to five decimals when they are written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customized_grpo.errors import CheckpointError
from customized_grpo.measures import hypervolume, joint_rates
from customized_grpo.types import Judgement

# Anchors: the reference itself, the ground truth, the ground truth of another example.
COPY, TRUTH, CHANCE = "copy", "ground truth", "unrelated"
BASE = "base"

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
class Results:
    """Cells of a study or of any runs, and the base and anchors they are judged against."""

    name: str
    objectives: dict[str, str]
    """Evaluator -> objective."""
    baselines: dict[str, Judgement]
    """Anchors and base."""
    labels: dict[str, str]
    """Method -> what tables call it, in their order."""
    main: str
    """The method that the others are compared with."""
    prompts: list[str]
    """Of the examples in the pictures."""
    cells: list[Cell]

    def evaluator(self, objective: str) -> str:
        """The first evaluator of an objective."""
        return next(name for name, measured in self.objectives.items() if measured == objective)

    def point(self, judgement: Judgement) -> tuple[float, float]:
        """(prompt, identity) means."""
        means = judgement.means
        return means[self.evaluator("prompt")], means[self.evaluator("identity")]

    def of(self, method: str) -> dict[int, Cell]:
        """Seed -> cell."""
        return {cell.seed: cell for cell in self.cells if cell.method == method}

    def values(self, judgement: Judgement) -> dict[str, float]:
        """All measures of one judgement, those against base and anchors included."""
        base = self.baselines[BASE]
        values = judgement.means | judgement.numbers
        attributes = [v for name, v in values.items() if name.startswith("attribute/")]
        if attributes:
            values["attributes"] = sum(attributes) / len(attributes)
        domination, collapse = joint_rates(self._scores(judgement), self._scores(base))
        values |= {"joint_domination": domination, "joint_collapse": collapse}
        if CHANCE in self.baselines:
            chance = self.point(self.baselines[CHANCE])
            values["hypervolume"] = hypervolume([self.point(judgement)], chance)
        for objective in ("prompt", "identity"):
            evaluator = self.evaluator(objective)
            if f"reward/{evaluator}" in values:
                gains = [
                    judgement.means[name] - base.means[name]
                    for name in (f"reward/{evaluator}", evaluator)
                ]
                values[f"hacking_gap/{objective}"] = gains[0] - gains[1]
        return values

    def _scores(self, judgement: Judgement) -> Tensor:
        return torch.stack([judgement.column(name) for name in self.objectives], 1)

    def over_seeds(self, method: str, measure: str, minus: str | None = None) -> Interval | None:
        """A measure's mean over seeds, or its paired difference to another method or the base."""
        own = {seed: self.values(cell.judgement) for seed, cell in self.of(method).items()}
        if minus == BASE:
            other = dict.fromkeys(own, self.values(self.baselines[BASE]))
        else:
            cells = self.of(minus) if minus else {}
            other = {seed: self.values(cell.judgement) for seed, cell in cells.items()}
        seeds = sorted(own.keys() & other.keys()) if minus else sorted(own)
        numbers = [
            own[s][measure] - (other[s][measure] if minus else 0.0)
            for s in seeds
            if measure in own[s]
        ]
        return Interval.of(numbers) if numbers else None

    def write(self, file: Path, write: Callable[[Path, str], None]) -> None:
        """Writes JSON by the function given."""
        write(file, json.dumps(_rounded(asdict(self)), separators=(",", ":")) + "\n")

    @classmethod
    def read(cls, file: Path) -> Results:
        """Reads what ``write`` wrote.

        Raises:
            CheckpointError: if the file is missing or holds something else.
        """
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            raw["baselines"] = {n: Judgement(**fields) for n, fields in raw["baselines"].items()}
            raw["cells"] = [
                Cell(**{**cell, "judgement": Judgement(**cell["judgement"])})
                for cell in raw["cells"]
            ]
            return cls(**raw)
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
