"""Means with 95 % intervals: of pictures by a bootstrap over subjects, of runs by Student's t.

A difference between methods has both: other seeds, and other examples, would have given another.

Pictures of one subject are not independent: a bootstrap over pictures would be too sure. Subjects
are drawn with replacement, each with all its pictures, always by the same random numbers, so that
an evaluation has one result. Differences are paired before they come here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from customized_grpo.ops.significance import standard_error

RESAMPLES = 10_000
_SEED = 0
_TAIL = 0.025  # on either side of the interval
_FEW_SEEDS = 3  # fewer may agree by chance


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the interval of those that one might have had with other subjects, or seeds."""

    mean: float
    low: float | None
    """None for a single subject or seed, which says nothing of others."""
    high: float | None
    count: int
    """Numbers in the mean."""
    subjects: int | None = None
    """What was drawn from; None over seeds."""

    @property
    def half_width(self) -> float:
        """Half of the interval; NaN without one."""
        return math.nan if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.low is not None and self.high is not None and self.low * self.high > 0

    def within(self, low: float, high: float) -> Estimate:
        """The same with an interval that ends where the number itself would."""
        if self.low is None or self.high is None:
            return self
        return replace(self, low=max(self.low, low), high=min(self.high, high))

    def as_drawn(self) -> Estimate:
        """Without the interval of two seeds, whose t is 12.7: it would hide those of the others."""
        return self if self.count >= _FEW_SEEDS else replace(self, low=None, high=None)

    def is_clear(self, digits: int) -> bool:
        """Whether a difference over seeds, printed with so many digits, is more than chance.

        Two seeds that agree by chance, and an interval of no width, say nothing.
        """
        width = round(self.half_width, digits) if self.low is not None else 0.0
        return self.count >= _FEW_SEEDS and abs(round(self.mean, digits)) > width > 0

    def in_brackets(self, sign: bool = False, digits: int = 3) -> str:
        """``0.760 [0.741, 0.778]``."""
        form = f"{'+' if sign else ''}z.{digits}f"
        if self.low is None or self.high is None:
            return f"{self.mean:{form}}"
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def plus_minus(self, digits: int = 4, sign: bool = False) -> str:
        """``0.7600 ± 0.0185``: the mean and the half-width; the interval if that is uneven."""
        if self.low is None or self.high is None:
            return self.in_brackets(sign, digits)
        below, above = self.mean - self.low, self.high - self.mean
        if not math.isclose(below, above, abs_tol=10**-digits / 2):
            return self.in_brackets(sign, digits)
        return f"{self.mean:{'+' if sign else ''}z.{digits}f} ± {self.half_width:.{digits}f}"


def over_seeds(
    numbers: Sequence[float], examples: float = math.nan, comparisons: int = 1
) -> Estimate:
    """Mean of one number per seed, with the confidence interval of Student's t.

    Args:
        numbers: one per seed.
        examples: half-width of the interval that the choice of examples makes, which is folded in;
            of one seed there is no other. NaN: not known.
        comparisons: intervals that are to hold at once (Bonferroni); each is the wider.
    """
    from scipy.stats import norm, t

    tail = 1 - _TAIL / comparisons
    examples *= float(norm.ppf(tail) / norm.ppf(1 - _TAIL))
    values = torch.tensor(numbers, dtype=torch.float64)
    count, mean = len(values), values.mean().item()
    if count == 1 and math.isnan(examples):
        return Estimate(mean, None, None, count)
    seeds = float(t.ppf(tail, count - 1)) * standard_error(values) if count > 1 else 0.0
    half = math.hypot(seeds, 0.0 if math.isnan(examples) else examples)
    return Estimate(mean, mean - half, mean + half, count)


def over_subjects(values: Tensor, subjects: Sequence[str]) -> Estimate | None:
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
        means = (draws * sums).sum(1) / (draws * counts).sum(1)
        low, high = (means.quantile(share).item() for share in (_TAIL, 1 - _TAIL))
    return Estimate(numbers.mean().item(), low, high, len(names), len(places))


def estimates(columns: Mapping[str, Tensor], subjects: Sequence[str]) -> dict[str, Estimate]:
    """``over_subjects`` for every column that has numbers."""
    found = {name: over_subjects(column, subjects) for name, column in columns.items()}
    return {name: value for name, value in found.items() if value is not None}


@lru_cache(maxsize=32)
def _draws(subjects: int) -> Tensor:
    """How often each resample holds each subject, ``[RESAMPLES, S]``."""
    rng = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(subjects, (RESAMPLES, subjects), generator=rng)
    counts = torch.zeros(RESAMPLES, subjects, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
