"""Results of one or several runs: what is kept of them, and their means over seeds.

A study keeps everything its tables and figures need in one ``results.json``; the run folders may
go. Numbers are rounded to five decimals when they are written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from customized_grpo.config.names import BASE
from customized_grpo.errors import CheckpointError
from customized_grpo.evaluation.outcome import Judgement, Yardstick, read_json
from customized_grpo.evaluation.statistics import Estimate, over_seeds, over_subjects
from customized_grpo.files import write_atomic
from customized_grpo.rewards.truth import SHARES
from customized_grpo.runs.alarms import ALARMS
from customized_grpo.runs.files import CONFIG, ENVIRONMENT, METRICS
from customized_grpo.training.hacking import COPY_GAPS

COPY_GAP = COPY_GAPS["validation"]
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
    """``update``, the validation scores then, ``copy_gap/validation`` where it is known, and
    ``seconds`` of training until then."""
    alarms: dict[str, list[int | float]] = field(default_factory=dict)
    """``update`` and, by ``KIND/EVALUATOR``, the validations in a row that look bad."""
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

    def first_passes(self, name: str, level: float) -> tuple[float, float] | None:
        """Update and seconds of training at which a curve first has a level; None: never.

        The seconds are NaN in results that were kept without.
        """
        for place, value in enumerate(self.curve.get(name, ())):
            if value >= level:
                seconds = self.curve.get("seconds")
                return self.curve["update"][place], seconds[place] if seconds else math.nan
        return None


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

    def is_on_one_machine(self, method: str, other: str) -> bool:
        """Whether the runs that two methods are compared by were trained on the same devices."""
        own, others = self.of(method), self.of(other)
        return all(
            own[seed].environment.get("device") == others[seed].environment.get("device")
            for seed in own.keys() & others.keys()
        )

    @property
    def methods(self) -> list[str]:
        """Those that have cells, in the order of the tables."""
        return [method for method in self.labels if self.of(method)]

    def over_seeds(
        self, method: str, measure: str, minus: str | None = None, comparisons: int = 1
    ) -> Estimate | None:
        """A measure's mean over seeds, or its paired difference to another method or the base.

        The interval of a difference takes in the examples' spread where it is a mean over them, and
        is so wide that it may be one of several ``comparisons``.
        """
        own = {seed: cell.judgement for seed, cell in self.of(method).items()}
        values = self._values(own, measure)
        if minus is None:
            found = over_seeds(list(values.values())) if values else None
            return found and found.within(*measure_range(measure))
        base = self.yardstick.base
        of_base = {} if base is None else dict.fromkeys(own, base)
        other = {s: c.judgement for s, c in self.of(minus).items()} if minus != BASE else of_base
        others = self._values(other, measure)
        seeds = sorted(values.keys() & others.keys())
        if not seeds:
            return None
        spread = self._spread([(own[seed], other[seed]) for seed in seeds], measure)
        return over_seeds([values[seed] - others[seed] for seed in seeds], spread, comparisons)

    def _values(self, judged: Mapping[int, Judgement], measure: str) -> dict[int, float]:
        """Seed -> number, of the runs that have one."""
        found = {s: self.yardstick.values(j).get(measure, math.nan) for s, j in judged.items()}
        return {seed: number for seed, number in found.items() if not math.isnan(number)}

    def _spread(self, pairs: Sequence[tuple[Judgement, Judgement]], measure: str) -> float:
        """Half-width of the interval over examples of the mean of paired differences.

        Over subjects, or over the pictures of a single one; NaN of what is no mean over examples.
        """
        columns = [[(j.tensors | self.yardstick.joint(j)).get(measure) for j in p] for p in pairs]
        differences = [a - b for a, b in columns if a is not None and b is not None]
        if not differences:
            return math.nan
        subjects = self.yardstick.subjects
        if len(set(subjects)) == 1:
            subjects = [str(row) for row in range(len(subjects))]
        found = over_subjects(torch.stack(differences).nanmean(0), subjects)
        return math.nan if found is None else found.half_width

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


def measure_range(measure: str) -> tuple[float, float]:
    """Between which numbers a measure lies: shares between 0 and 1."""
    is_share = measure in SHARES or measure.startswith(("attribute/", "joint/"))
    return (0.0, 1.0) if is_share else (-math.inf, math.inf)


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
    validated = [row for row in rows if any(name in row for name in scores)]
    if validated and all(COPY_GAP in row for row in validated):
        scores.append(COPY_GAP)
    alarms = [name for name in names if name.partition("/")[0] in ALARMS]
    looked = [row for row in rows if row.keys() & set(alarms)]  # a count may begin late
    looking = ("seconds/validation", "seconds/samples")  # is no training
    timed = [name for name in names if name.startswith("seconds/") and name not in looking]
    per_row = (sum(row.get(name, 0.0) for name in timed) for row in rows)
    spent = list(accumulate(per_row, initial=0.0))
    clocked = [row | {"seconds": now} for row, now in zip(rows, spent[1:], strict=True)]
    return Cell(
        method=method,
        seed=seed,
        judgement=judgement,
        config=config,
        curve=_series(clocked, scores and [*scores, "seconds"]),
        alarms=_series([dict.fromkeys(alarms, 0.0) | row for row in looked], alarms),
        shares=_series(rows, _SHARES),
        advantages={name: values for name, values in first.items() if name != "rollout"},
        schedule=schedule,
        seconds=spent[-1],
        environment=environment,
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _series(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, list[int | float]]:
    """Columns of the rows that have them all."""
    having = [row for row in rows if names and all(name in row for name in names)]
    return {name: [row[name] for row in having] for name in ("update", *names)} if having else {}
