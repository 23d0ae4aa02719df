"""Schedules: how the objectives share the weight of every step, TDW and others.

Legend of axis suffixes: K steps (those that are trained, or all), N objectives.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from customized_grpo.ops.sde import Real, require_full_precision

# The released recipe (arXiv:2510.18263) is a table over 25 steps of a shift-3 schedule.
_PAPER_STEPS = 25
_PAPER_SHIFT = 3.0

# "On" a phase boundary, in steps: far above float32 rounding of t (1e-5), far below one step.
_BOUNDARY_TOLERANCE = 1e-3


def tdw_weights(
    sigmas: Float[Tensor, " steps"],
    high: Real = 0.7,
    low: Real = 0.3,
    start: Real = 6,
    center: Real = 10,
    slope: Real = 0.8,
    end: Real = 22,
    final: Real = 0.5,
) -> Float32[Tensor, "steps 2"]:
    """Time-Aware Dynamic Weighting (arXiv:2510.18263): the prompt early, the identity late.

    With t the position of sigma on the paper's trajectory, `t = 25 p(sigma)` and
    `p(sigma) = 1 - sigma / (3 - 2 sigma)`, the prompt weight is

    - `high` for `t < start`,
    - `low + (high - low) (1 - sigmoid(slope (t - center)))` for `start <= t < end`,
    - `final` for `t >= end`,

    and `w_identity = 1 - w_prompt`. On the paper's schedule (T = 25, shift 3) t is the step index
    and the released table comes out; any other schedule gets the weight that belongs to its noise
    level. A t within 1e-3 of a boundary counts as on it, so float rounding of sigma cannot move a
    step to another phase.

    Args:
        sigmas: `[K]` noise level at which each step starts, in [0, 1], not half precision.
        high: prompt weight at high noise, in [0, 1].
        low: prompt weight the descent tends to, in [0, 1].
        start: where the descent starts, in paper steps (0 to 25).
        center: where it is half way.
        slope: its steepness per paper step.
        end: where it stops.
        final: prompt weight after `end`, in [0, 1].

    Returns:
        `[K, 2]` float32, columns (identity, prompt); every row sums to 1.

    Raises:
        ValueError: if a sigma or a weight is outside [0, 1], the sigmas are in half precision, or
            start > end.

    Example:
        Steps 0, 10, 20 and 24 of the paper's 25:

        >>> tdw_weights(shifted_sigmas(25, shift=3.0)[[0, 10, 20, 24]])
        tensor([[0.3000, 0.7000],
                [0.5000, 0.5000],
                [0.6999, 0.3001],
                [0.5000, 0.5000]])
    """
    _check_fractions(high=high, low=low, final=final)
    if start > end:
        raise ValueError(
            f"start must not be above end, got {start} and {end}; both are paper steps, 0 to 25."
        )
    t = _PAPER_STEPS * _trajectory_progress(sigmas)
    prompt = low + (high - low) * torch.sigmoid(-slope * (t - center))
    prompt = torch.where(t < start - _BOUNDARY_TOLERANCE, high, prompt)
    prompt = torch.where(t >= end - _BOUNDARY_TOLERANCE, final, prompt)
    return _weight_columns(prompt)


def constant_weights(
    sigmas: Float[Tensor, " steps"], prompt: Real = 0.5
) -> Float32[Tensor, "steps 2"]:
    """Returns the same weights at every noise level: (1 - prompt, prompt).

    Args:
        sigmas: `[K]` in [0, 1]; only their number matters.
        prompt: weight of the prompt objective, in [0, 1]; 0.5 is the paper's naive 1:1 and 0.6
            its 1:1.5.

    Returns:
        `[K, 2]` float32, columns (identity, prompt); every row sums to 1.

    Raises:
        ValueError: if a sigma or `prompt` is outside [0, 1], or the sigmas are in half precision.

    Example:
        >>> constant_weights(torch.tensor([1.0, 0.5]), prompt=0.6)
        tensor([[0.4000, 0.6000],
                [0.4000, 0.6000]])
    """
    _check_fractions(prompt=prompt)
    return _weight_columns(torch.full_like(_trajectory_progress(sigmas), prompt))


def linear_weights(
    sigmas: Float[Tensor, " steps"], high: Real = 0.7, low: Real = 0.3
) -> Float32[Tensor, "steps 2"]:
    """Moves the prompt weight in a straight line from `high` at sigma = 1 to `low` at sigma = 0.

    `w_prompt = high + (low - high) p(sigma)` on the clock of `tdw_weights`,
    `p(sigma) = 1 - sigma / (3 - 2 sigma)`, the fraction of the paper's trajectory that is done: the
    shape changes and nothing else. The identity weight rises from `1 - high` to `1 - low`.

    Args:
        sigmas: `[K]` noise level at which each step starts, in [0, 1], not half precision.
        high: prompt weight at pure noise, in [0, 1].
        low: prompt weight at the image, in [0, 1].

    Returns:
        `[K, 2]` float32, columns (identity, prompt); every row sums to 1.

    Raises:
        ValueError: if a sigma or a weight is outside [0, 1], or the sigmas are in half precision.

    Example:
        At the start, half way (on the clock of the paper's schedule) and at the end:

        >>> linear_weights(torch.tensor([1.0, 0.75, 0.0]))
        tensor([[0.3000, 0.7000],
                [0.5000, 0.5000],
                [0.7000, 0.3000]])
    """
    _check_fractions(high=high, low=low)
    return _weight_columns(high + (low - high) * _trajectory_progress(sigmas))


def cosine_weights(
    sigmas: Float[Tensor, " steps"], high: Real = 0.7, low: Real = 0.3
) -> Float32[Tensor, "steps 2"]:
    """Moves the prompt weight along half a cosine from `high` at sigma = 1 to `low` at sigma = 0.

    `w_prompt = high + (low - high) (1 - cos(pi p(sigma))) / 2` on the clock of `tdw_weights`,
    `p(sigma) = 1 - sigma / (3 - 2 sigma)`; flat at both ends. The identity weight rises from
    `1 - high` to `1 - low` as sigma falls.

    Args:
        sigmas: `[K]` noise level at which each step starts, in [0, 1], not half precision.
        high: prompt weight at pure noise, in [0, 1].
        low: prompt weight at the image, in [0, 1].

    Returns:
        `[K, 2]` float32, columns (identity, prompt); every row sums to 1.

    Raises:
        ValueError: if a sigma or a weight is outside [0, 1], or the sigmas are in half precision.

    Example:
        At the start, after a quarter and half way:

        >>> cosine_weights(torch.tensor([1.0, 0.9, 0.75]))
        tensor([[0.3000, 0.7000],
                [0.3586, 0.6414],
                [0.5000, 0.5000]])
    """
    _check_fractions(high=high, low=low)
    eased = 0.5 * (1.0 - torch.cos(math.pi * _trajectory_progress(sigmas)))
    return _weight_columns(high + (low - high) * eased)


SCHEDULES: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "tdw": tdw_weights,
        "constant": constant_weights,
        "linear": linear_weights,
        "cosine": cosine_weights,
    }
)
"""The weight schedules by name: each is `(sigmas [K], its own options) -> [K, 2]`; read-only."""


def measured_weights(
    moved: Float[Tensor, "steps objectives"],
) -> Float32[Tensor, "steps objectives"]:
    """Weighs every step by which objective its noise moves, relative to the other steps.

    With `moved[k, n]` the variance of objective n that the noise of step k causes
    (`noise_variance`) and `s[k, n] = moved[k, n] / sum_k moved[k, n]` its share of the objective,

    `w[k, n] = s[k, n] / sum_m s[k, m]`.

    An advantage is, to a step, what its own noise did to it plus what the other steps' noise did,
    which is chance there. The best linear estimate of the first from the whole is s times the
    whole (Wiener), and the rows are scaled to sum to 1 as in `tdw_weights`. No objective is
    favoured: of two, both keep the same part of what can be credited, `sum_k w s`, at least a half.

    Args:
        moved: `[K, N]`, not negative, in any unit of its own for each column. An objective that no
            step moves counts as moved alike by all, a step that moves none as even.

    Returns:
        `[K, N]` float32; every row sums to 1.

    Raises:
        ValueError: if a number is negative or not finite.

    Example:
        The first of two steps moves the second objective more:

        >>> measured_weights(torch.tensor([[1.0, 30.0], [1.0, 10.0]]))
        tensor([[0.4000, 0.6000],
                [0.6667, 0.3333]])
    """
    if not bool((moved.isfinite() & (moved >= 0)).all()):
        raise ValueError(f"moved must be finite and not negative, got {moved.tolist()}.")
    return _parts_of_one(_parts_of_one(moved.float(), 0), 1)


def _parts_of_one(values: Tensor, dim: int) -> Tensor:
    total = values.sum(dim, keepdim=True)
    return torch.where(total > 0, values / total, 1.0 / values.shape[dim])


def _trajectory_progress(sigmas: Tensor) -> Tensor:
    """Inverts the paper's shift-3 schedule: i / 25 at its i-th sigma, 0 at noise, 1 at data."""
    require_full_precision("sigmas", sigmas)
    if not bool(((sigmas >= 0) & (sigmas <= 1)).all()):
        raise ValueError(
            f"sigmas must lie in [0, 1], got {sigmas.tolist()}; pass noise levels, not timesteps."
        )
    sigma = sigmas.float()
    return 1.0 - sigma / (_PAPER_SHIFT - (_PAPER_SHIFT - 1.0) * sigma)


def _weight_columns(prompt_K: Tensor) -> Tensor:
    return torch.stack([1.0 - prompt_K, prompt_K], dim=-1)


def _check_fractions(**values: Real) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(
                f"{name} must lie in [0, 1], got {value}; it is the weight of the prompt objective."
            )
