"""Is a change more than noise, and large enough to speak of?

One rule for the tables, sentences and alarms that say so. Noise: a change counts from twice the
standard error of its paired differences on; an error of 0 says that too few numbers are known.
Size: below a tenth of the spread of the base's own pictures nobody would see it, however many
pictures have made it certain (Cohen, 1988, calls a fifth of a standard deviation small).
"""

from __future__ import annotations

import math

from torch import Tensor

SLIGHT = 0.1
"""Standard deviations."""


def standard_error(differences: Tensor) -> float:
    """Standard error of the mean of ``[B]`` paired differences; NaN entries are left out.

    NaN of fewer than two.
    """
    values = differences[~differences.isnan()]
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan


def change(now: Tensor, then: Tensor) -> tuple[float, float]:
    """Mean paired difference of ``[B]`` and its standard error; NaN where nothing is known."""
    difference = now - then
    return difference.nanmean().item(), standard_error(difference)


def is_clear(mean: float, error: float) -> bool:
    """Whether a mean change is more than noise."""
    return abs(mean) > 2 * error > 0


def is_slight(mean: float, base: Tensor) -> bool:
    """Whether a mean change is small beside how much the base's numbers ``[B]`` differ."""
    known = base[~base.isnan()]
    return len(known) > 1 and abs(mean) < SLIGHT * known.std().item()
