"""What each objective's weight is multiplied by, from the objectives' gradients (MARBLE,
arXiv:2605.06507).

The loss is affine in the advantage at the model that sampled: the gradient of an objective is that
of the loss with its part of the advantage alone, less that of the loss without any, and a factor on
its gradient is one on its weight. So gradients are taken at some rollouts only, and the factors
serve those that follow.

For ``marble`` gradients are compared at equal weights, of which the schedule gives the shape over
the steps alone: the factors make up for the gradients' lengths, and leave to it how much of each is
wanted. ``mgda`` decides that itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from customized_grpo.config import BalanceSettings
from customized_grpo.ops import balanced_factors
from customized_grpo.runs.ranks import Ranks
from customized_grpo.runs.sharding import whole

logger = logging.getLogger("customized_grpo")

Gradients = Sequence[Tensor | None]
"""Of all trained parameters; None where there is none."""


def rebalance(
    factors: Mapping[str, float],
    gradient: Callable[[Tensor], Gradients],
    per_objective: Tensor,
    weights: Tensor,
    steps: range,
    settings: BalanceSettings,
    ranks: Ranks,
    *,
    has_rest: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """The factors after a rollout's gradients, and what these gradients are like.

    Args:
        factors: of every objective, up to now.
        gradient: of all processes' pairs, from advantages ``[b, T]`` of this one's samples.
        per_objective: ``[b, N]``, NaN rows being invalid.
        weights: ``[T, N]`` of the objectives by the schedule, without factors.
        steps: those that may be trained.
        settings: of the config.
        ranks: the processes; all get the same.
        has_rest: the loss has a gradient without any advantage, which belongs to no objective.

    Returns:
        The new factors, averaged with the old ones; and ``balance/norm/NAME``,
        ``balance/factor/NAME`` and ``balance/cosine/NAME/NAME``, or nothing, and the factors as
        they were, where a gradient is not finite.
    """
    if settings.method == "marble":
        means = weights[steps.start : steps.stop].mean(0)
        weights = weights / means.where(means > 0, 1.0) / len(means)
    parts = per_objective.nan_to_num()[:, None, :] * weights  # [b, T, N]
    rest = gradient(torch.zeros_like(parts[..., 0])) if has_rest else None
    found = [_less(gradient(part), rest) for part in parts.unbind(-1)]
    rows = [[_inner(one, other) for other in found] for one in found]
    gram = torch.tensor(ranks.broadcast(rows), dtype=torch.float64)
    if not gram.isfinite().all():
        logger.warning("advantage.balance: a gradient is not finite; all factors stay")
        return dict(factors), {}
    fresh = balanced_factors(gram, settings.method).tolist()
    averaged = {
        name: settings.decay * old + (1 - settings.decay) * new
        for (name, old), new in zip(factors.items(), fresh, strict=True)
    }
    return averaged, _describe(gram, averaged)


def _less(one: Gradients, rest: Gradients | None) -> Gradients:
    if rest is None:
        return one
    pairs = zip(one, rest, strict=True)
    return [a if b is None else b.neg() if a is None else a.sub_(b) for a, b in pairs]


def _inner(one: Gradients, other: Gradients) -> float:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    products = [whole((a.float() * b.float()).sum(dtype=torch.float64)) for a, b in pairs]
    return torch.stack(products).sum().item() if products else 0.0


def _describe(gram: Tensor, factors: Mapping[str, float]) -> dict[str, float]:
    norms = dict(zip(factors, gram.diagonal().sqrt().tolist(), strict=True))
    found = {f"balance/norm/{name}": norm for name, norm in norms.items()}
    found |= {f"balance/factor/{name}": factor for name, factor in factors.items()}
    for (i, one), (j, other) in combinations(enumerate(factors), 2):
        if norms[one] and norms[other]:
            cosine = gram[i, j].item() / (norms[one] * norms[other])
            found[f"balance/cosine/{one}/{other}"] = cosine
    return found
