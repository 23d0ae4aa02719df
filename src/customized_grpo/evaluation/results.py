"""Results of one or several runs: what is kept of them, and their means over seeds.

A study keeps everything its tables and figures need in one ``results.json``; the run folders may
go. Numbers are rounded to five decimals when they are written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from customized_grpo.errors import CheckpointError
from customized_grpo.evaluation.outcome import BASE, Judgement, Yardstick, read_json
from customized_grpo.evaluation.statistics import Estimate, over_seeds
from customized_grpo.files import write_atomic
from customized_grpo.runs.files import CONFIG, ENVIRONMENT, METRICS

_SHARES = ("share/conflicted", "share/both_positive", "share/both_negative")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is kept of one run."""

    method: str
    seed: int
    judgement: Judgement
    config: str
    """The resolved YAML."""
    curve: dict[str, list[int | float]] = field(default_factory=dict)
    """``update`` and the validation scores at these updates."""
    shares: dict[str, list[int | float]] = field(default_factory=dict)
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
    """Cells of a study or of any runs, and what they are judged against."""

    name: str
    config: str
    """YAML of a run: its base, examples and evaluators are those of all."""
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

    def over_seeds(self, method: str, measure: str, minus: str | None = None) -> Estimate | None:
        """A measure's mean over seeds, or its paired difference to another method or the base."""
        own = self._values(method, measure)
        if minus is None:
            other = dict.fromkeys(own, 0.0)
        elif minus == BASE:
            base = self.yardstick.base
            values = {} if base is None else self.yardstick.values(base)
            other = dict.fromkeys(own, values[measure]) if measure in values else {}
        else:
            other = self._values(minus, measure)
        numbers = [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]
        return over_seeds(numbers) if numbers else None

    def _values(self, method: str, measure: str) -> dict[int, float]:
        """Seed -> number, of the runs that have one."""
        found = {seed: self.yardstick.values(c.judgement) for seed, c in self.of(method).items()}
        known = {seed: values.get(measure, math.nan) for seed, values in found.items()}
        return {seed: number for seed, number in known.items() if not math.isnan(number)}

    def write(self, file: Path) -> None:
        """Writes the JSON that ``read`` reads."""
        rounded = json.loads(json.dumps(asdict(self)), parse_float=lambda n: round(float(n), 5))
        text = json.dumps(rounded, separators=(",", ":"), ensure_ascii=False)
        write_atomic(file, text + "\n")

    @classmethod
    def read(cls, file: Path) -> Results:
        """Reads what ``write`` wrote."""
        fix = "remove it and run cgrpo compare again"
        return read_json(cls, file, "results of a study", fix)


def read_cell(folder: Path, method: str, seed: int, judgement: Judgement) -> Cell:
    """What is kept of a run folder.

    Raises:
        CheckpointError: if a file of the run is missing or damaged.
    """
    try:
        rows = _lines(folder / METRICS)
        first = _lines(folder / "advantages.jsonl")[0]
        schedule = json.loads((folder / "schedule.json").read_text(encoding="utf-8"))
        config = (folder / CONFIG).read_text(encoding="utf-8")
        environment = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError, IndexError) as error:
        raise CheckpointError(f"RUN: {folder} is not the folder of a run: {error}") from error
    names = dict.fromkeys(name for row in rows for name in row)
    scores = [name for name in names if name.startswith("validation/")]
    timed = [name for name in names if name.startswith("seconds/") and "validation" not in name]
    return Cell(
        method=method,
        seed=seed,
        judgement=judgement,
        config=config,
        curve=_series(rows, scores),
        shares=_series(rows, _SHARES),
        advantages={name: values for name, values in first.items() if name != "rollout"},
        schedule=schedule,
        seconds=sum(row.get(name, 0.0) for row in rows for name in timed),
        environment=environment,
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _series(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, list[int | float]]:
    """Columns of the rows that have them all."""
    having = [row for row in rows if names and all(name in row for name in names)]
    return {name: [row[name] for row in having] for name in ("update", *names)} if having else {}
