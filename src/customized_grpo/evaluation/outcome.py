"""What an evaluation found: numbers per picture of a model, of anchors and of a base, and the JSON.

A run and a benchmark have the same form. Nothing of time, machine load or process is in it: the
same pictures and models give the same bytes. Numbers are rounded when a judgement is made, so that
what is read from a file is what was written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from customized_grpo.config.names import BASE, COPY, RANDOM, UNRELATED
from customized_grpo.errors import CheckpointError
from customized_grpo.evaluation.items import Item
from customized_grpo.evaluation.measures import hypervolume, joint_columns
from customized_grpo.evaluation.statistics import Estimate, estimates
from customized_grpo.ops.significance import is_clear, is_slight, standard_error
from customized_grpo.rewards.truth import SHARES

T = TypeVar("T")

TUNED = "tuned"
_ZERO = {"prompt": (UNRELATED, COPY), "identity": (UNRELATED, RANDOM)}  # where the axes begin
_DIGITS = 7  # float32 has no more


@dataclass(frozen=True)
class Judgement:
    """What was measured of one model's pictures."""

    columns: dict[str, list[float | None]]
    """Measure -> one number per picture; None where it does not apply."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Measures of the set as a whole."""

    @classmethod
    def of(
        cls, columns: Mapping[str, Tensor], numbers: Mapping[str, float] | None = None
    ) -> Judgement:
        """Rounds columns ``[N]``, whose NaN do not apply, and numbers."""
        return cls(
            columns={name: list(map(_rounded, c.tolist())) for name, c in columns.items()},
            numbers={name: round(number, _DIGITS) for name, number in (numbers or {}).items()},
        )

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every column ``[N]``, NaN where it does not apply."""
        return {
            name: torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)
            for name, values in self.columns.items()
        }

    @cached_property
    def means(self) -> dict[str, float]:
        """Mean of every column over the pictures it applies to."""
        return {name: column.nanmean().item() for name, column in self.tensors.items()}

    def take(self, rows: Sequence[int | None]) -> Judgement:
        """The columns of some pictures in another order; None stands for one that is not there."""
        return Judgement(
            columns={
                name: [None if row is None else column[row] for row in rows]
                for name, column in self.columns.items()
            },
            numbers=self.numbers,
        )


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What a model is held against: what was asked for, anchors and a base."""

    set: str
    """A split, or the type of a benchmark."""
    items: tuple[Item, ...]
    """What the rows of all columns are."""
    objectives: dict[str, str]
    """Column -> the objective it measures; the first one of each is its leading column."""
    rewards: dict[str, str] = field(default_factory=dict)
    """Reward of the training -> its objective; the columns are called ``reward/LABEL``."""
    anchors: dict[str, Judgement] = field(default_factory=dict)
    base: Judgement | None = None
    """The model to compare with; None: there is none."""
    base_name: str = BASE

    @property
    def models(self) -> dict[str, Judgement]:
        """Anchors and base."""
        return self.anchors | ({} if self.base is None else {self.base_name: self.base})

    def describe(self) -> str:
        """``512 held-out examples``."""
        return f"{len(self.items)} {self.set.replace('_', '-')} examples"

    def agrees_with(self, other: Yardstick) -> bool:
        """Whether numbers of both can be compared: the same items, judged by the same models."""
        mine, theirs = ((y.set, y.items, y.objectives, y.rewards) for y in (self, other))
        return mine == theirs

    @cached_property
    def leading(self) -> dict[str, str]:
        """Objective -> the column that joint rates and the hypervolume take."""
        return {objective: name for name, objective in reversed(self.objectives.items())}

    @property
    def subjects(self) -> list[str]:
        """Whose picture each one is; where the data do not say, each is a subject of its own."""
        return [item.subject or f"#{row}" for row, item in enumerate(self.items)]

    def joint(self, judged: Judgement) -> dict[str, Tensor]:
        """Joint domination of the base and joint collapse; {} where a leading column is missing.

        Of the base itself too: held against itself, it says nothing.
        """
        names = [self.leading[objective] for objective in dict.fromkeys(self.objectives.values())]
        if self.base is None or judged is self.base:
            return {}
        if not set(names) <= judged.columns.keys() & self.base.columns.keys():
            return {}
        own, base = ({name: j.tensors[name] for name in names} for j in (judged, self.base))
        return joint_columns(own, base)

    def differences(self, judged: Judgement) -> dict[str, Tensor]:
        """A model less the base, picture by picture; NaN where one of the two is missing."""
        base = {} if self.base is None else self.base.tensors
        return {name: own - base[name] for name, own in judged.tensors.items() if name in base}

    def hypervolume(self, judged: Judgement) -> float | None:
        """Area of (prompt, identity) above the anchors where these two axes begin; None without."""
        point, zero = [], []
        for objective, names in _ZERO.items():
            column = self.leading.get(objective, "")
            found = [self.anchors[name].means.get(column) for name in names if name in self.anchors]
            point.append(judged.means.get(column))
            zero.append(next((mean for mean in found if mean is not None), None))
        if None in point or None in zero:
            return None
        return hypervolume(point, zero)

    def values(self, judged: Judgement) -> dict[str, float]:
        """Every measure of a model as one number."""
        joint = {name: column.nanmean().item() for name, column in self.joint(judged).items()}
        values = judged.means | judged.numbers | joint
        area = self.hypervolume(judged)
        return values | ({} if area is None else {"hypervolume": area}) | self._gaps(judged)

    def _gaps(self, judged: Judgement) -> dict[str, float]:
        """Gain over the base by the reward less gain by the evaluator; not of anchors and base."""
        if self.base is None or judged in self.models.values():
            return {}
        gaps: dict[str, float] = {}
        for label, objective in self.rewards.items():
            names = f"reward/{label}", self.leading.get(objective, "")
            if all(name in judged.columns for name in names):
                gains = [judged.means[name] - self.base.means[name] for name in names]
                gaps.setdefault(f"hacking_gap/{objective}", gains[0] - gains[1])
        return gaps

    def summary(self, judged: Judgement) -> dict[str, Estimate]:
        """The mean of every column with its interval."""
        return estimates(judged.tensors | self.joint(judged), self.subjects)

    def take(self, rows: Sequence[int]) -> Yardstick:
        """The same for some of the items."""
        return replace(
            self,
            items=tuple(self.items[row] for row in rows),
            anchors={name: anchor.take(rows) for name, anchor in self.anchors.items()},
            base=None if self.base is None else self.base.take(rows),
        )


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a benchmark's numbers depend on besides the items; a run has its config in its folder.

    Two evaluations can be compared if their ``digest`` and the encoders that they share are equal.
    """

    digest: str
    """SHA-256 of photos and items."""
    counts: dict[str, int]
    rules: dict[str, str]
    config: dict[str, Any]
    encoders: dict[str, dict[str, Any]]
    """Metric -> what its numbers depend on."""
    files: tuple[str, ...]
    digests: tuple[str, ...]
    """SHA-256 of the pictures."""
    missing: tuple[str, ...] = ()
    """Pictures that a partial evaluation lacks."""
    base_is_partial: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One model against its yardstick."""

    name: str
    own: Judgement
    yardstick: Yardstick
    origin: Origin | None = None
    weights: str | None = None
    """SHA-256 of the trained weights that were judged; None: there were none, or it is not known,
    of an evaluation by an earlier version."""
    format: Literal[2] = 2

    @property
    def is_partial(self) -> bool:
        """Whether pictures of a benchmark are missing."""
        return self.origin is not None and bool(self.origin.missing)

    @property
    def models(self) -> dict[str, Judgement]:
        """Anchors, base and the model itself."""
        return self.yardstick.models | {self.name: self.own}

    @cached_property
    def summary(self) -> dict[str, Estimate]:
        """The model's means."""
        return self.yardstick.summary(self.own)

    @cached_property
    def changes(self) -> dict[str, Estimate]:
        """Paired differences to the base."""
        return estimates(self.yardstick.differences(self.own), self.yardstick.subjects)

    def change(self, column: str) -> tuple[float, float]:
        """Mean paired difference to the base and its standard error over the pictures."""
        difference = self.yardstick.differences(self.own)[column]
        return difference.nanmean().item(), standard_error(difference)

    def differs(self, column: str) -> bool:
        """Whether a column's change is more than noise and large enough to speak of.

        Of a share that is a picture of a hundred, of a similarity what ``is_slight`` says.
        """
        assert self.yardstick.base is not None
        (mean, error), interval = self.change(column), self.changes[column]
        if column in SHARES:  # of n pictures that all changed alike, one more might not have
            error, slight = max(error, 1 / interval.count), abs(mean) < 0.01
        else:
            slight = is_slight(mean, self.yardstick.base.tensors[column])
        sure = interval.low is None or interval.excludes_zero
        return sure and not slight and is_clear(mean, error)

    @cached_property
    def groups(self) -> dict[str, dict[str, Outcome]]:
        """``category`` and ``kind`` -> group -> its part; {} where there is one group only."""
        return {name: self._parts(name) for name in ("category", "kind")}

    def _parts(self, attribute: str) -> dict[str, Outcome]:
        rows: dict[str, list[int]] = {}
        for row, item in enumerate(self.yardstick.items):
            rows.setdefault(getattr(item, attribute), []).append(row)
        names = sorted(rows.keys() - {""})
        if len(names) < 2:
            return {}
        return {
            name: replace(
                self, own=self.own.take(rows[name]), yardstick=self.yardstick.take(rows[name])
            )
            for name in names
        }

    def to_json(self) -> str:
        """The whole file: every number of every picture, and what follows from them."""
        groups = {
            name: {group: part._statistics() for group, part in parts.items()}
            for name, parts in self.groups.items()
        }
        compared = {} if self.origin else {BASE: self.yardstick.base, self.name: self.own}  # a run
        more = {
            **{name: self._numbers(judged) for name, judged in compared.items() if judged},
            "complete": not self.is_partial,
            "statistics": self._statistics(),
            "groups": groups,
        }
        return json.dumps(more | asdict(self), ensure_ascii=False) + "\n"

    def _numbers(self, judged: Judgement) -> dict[str, float | None]:
        """Every measure of a model as one number, for those who want no more."""
        return {name: _rounded(number) for name, number in self.yardstick.values(judged).items()}

    def _statistics(self) -> dict[str, Any]:
        return {
            "models": {
                name: {
                    "means": _plain(self.yardstick.summary(judged)),
                    "hypervolume": _rounded(self.yardstick.hypervolume(judged)),
                }
                for name, judged in self.models.items()
            },
            "changes": _plain(self.changes),
        }

    @classmethod
    def read(cls, file: Path) -> Outcome:
        """Reads what ``to_json`` wrote."""
        return read_json(cls, file, "the result of an evaluation", "run cgrpo evaluate")


def read_json(cls: type[T], file: Path, what: str, fix: str) -> T:
    """Reads a dataclass; what else the file has is left out.

    Raises:
        CheckpointError: if the file is missing or is not ``what``.
    """
    try:
        return TypeAdapter(cls).validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except OSError as error:
        why = error.strerror
    raise CheckpointError(f"{file}: must be {what}, cannot be read ({why}); {fix}")


def _plain(values: Mapping[str, Estimate]) -> dict[str, dict[str, Any]]:
    return {
        name: {key: _rounded(v) if isinstance(v, float) else v for key, v in asdict(value).items()}
        for name, value in values.items()
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, _DIGITS)
