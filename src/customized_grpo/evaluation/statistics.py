"""Means over pictures, with intervals from a bootstrap over subjects.

Pictures of one subject are not independent: a bootstrap over pictures would be too sure. Subjects
are drawn with replacement, each with all its pictures, always by the same random numbers, so that
an evaluation has one result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 10_000
_SEED = 0
_TAIL = 0.025  # on either side of the interval


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, and the 95 % interval of the subjects one might have had."""

    mean: float
    low: float | None
    """None for a single subject: there is nothing to draw from."""
    high: float | None
    images: int
    subjects: int

    def text(self, sign: bool = False) -> str:
        """``0.760 [0.741, 0.778]``."""
        form = "+.3f" if sign else ".3f"
        if self.low is None or self.high is None:
            return f"{self.mean:{form}}"
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@lru_cache(maxsize=32)
def _draws(subjects: int) -> Tensor:
    """How often each resample holds each subject, ``[RESAMPLES, S]``."""
    random = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(subjects, (RESAMPLES, subjects), generator=random)
    counts = torch.zeros(RESAMPLES, subjects, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def estimate(values: Tensor, subjects: Sequence[str]) -> Estimate | None:
    """Mean of numbers ``[N]`` of pictures of the given subjects; NaN are left out.

    None if there is none left.
    """
    values = values.double()
    known = ~values.isnan()
    names = [name for name, is_known in zip(subjects, known.tolist(), strict=True) if is_known]
    if not names:
        return None
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    place = torch.tensor([places[name] for name in names])
    numbers = values[known]
    sums = torch.zeros(len(places), dtype=torch.float64).scatter_add_(0, place, numbers)
    counts = torch.bincount(place, minlength=len(places)).double()
    low = high = None
    if len(places) > 1:
        draws = _draws(len(places))
        means = ((draws * sums).sum(1) / (draws * counts).sum(1)).sort().values
        low, high = (_quantile(means, q) for q in (_TAIL, 1 - _TAIL))
    return Estimate(numbers.mean().item(), low, high, len(names), len(places))


def _quantile(ordered: Tensor, share: float) -> float:
    """With linear interpolation, as numpy's default."""
    position = share * (len(ordered) - 1)
    first = math.floor(position)
    second = min(first + 1, len(ordered) - 1)
    return torch.lerp(ordered[first], ordered[second], position - first).item()


def estimates(columns: Mapping[str, Tensor], subjects: Sequence[str]) -> dict[str, Estimate]:
    """Estimate of every column that has numbers."""
    found = {name: estimate(column, subjects) for name, column in columns.items()}
    return {name: value for name, value in found.items() if value is not None}
