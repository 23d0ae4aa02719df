"""From reward scores to the advantage of every sample at every denoising step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from customized_grpo.config import (
    DEFAULT_GAMMA,
    AdvantageConfig,
    ConstantSchedule,
    CosineSchedule,
    CustomSchedule,
    LinearSchedule,
    RewardConfig,
    TdwSchedule,
)
from customized_grpo.errors import ConfigError
from customized_grpo.ops import (
    SHAPINGS,
    constant_weights,
    cosine_weights,
    group_normalize,
    linear_weights,
    shape_advantages,
    tdw_weights,
)
from customized_grpo.registry import import_object
from customized_grpo.types import Advantages


def objective_advantages(
    scores: Tensor,
    group_ids: Tensor,
    rewards: Sequence[RewardConfig],
    objectives: Sequence[str],
) -> Tensor:
    """Group-normalised advantage of every objective ``[B, N]`` from scores ``[B, R]``.

    Rewards of one objective are mixed by weight after normalisation, and the mix is normalised
    again. An image that at least one reward could not score is left out of its group altogether:
    its row is NaN.
    """
    unscorable = scores.isnan().any(dim=1, keepdim=True)
    normalized = group_normalize(scores.masked_fill(unscorable, torch.nan), group_ids)
    columns = []
    for objective in objectives:
        members = [i for i, reward in enumerate(rewards) if reward.objective == objective]
        weights = torch.tensor([rewards[i].weight for i in members], device=scores.device)
        mixed = (normalized[:, members] * weights / weights.sum()).sum(1, keepdim=True)
        columns.append(group_normalize(mixed, group_ids) if len(members) > 1 else mixed)
    return torch.cat(columns, 1)


def objective_weights(sigmas: Tensor, config: AdvantageConfig, objectives: Sequence[str]) -> Tensor:
    """Weight of every objective at every noise level ``[len(sigmas), N]``; rows sum to 1."""
    pair = _schedule(sigmas, config)
    rest = 1 - sum(config.extra_weights.values())
    columns = {"identity": pair[:, 0] * rest, "prompt": pair[:, 1] * rest}
    columns |= {
        name: torch.full_like(pair[:, 0], weight) for name, weight in config.extra_weights.items()
    }
    return torch.stack([columns[name] for name in objectives], 1)


def _schedule(sigmas: Tensor, config: AdvantageConfig) -> Tensor:
    match config.schedule:
        case TdwSchedule(high=high, low=low, start=start, center=center, slope=slope, end=end,
                         final=final):  # fmt: skip
            return tdw_weights(sigmas, high, low, start, center, slope, end, final)
        case ConstantSchedule(prompt=prompt):
            return constant_weights(sigmas, prompt)
        case LinearSchedule(high=high, low=low):
            return linear_weights(sigmas, high, low)
        case CosineSchedule(high=high, low=low):
            return cosine_weights(sigmas, high, low)
        case CustomSchedule(target=target):
            weights = import_object(target, "advantage.schedule.target")(sigmas)
            if not isinstance(weights, Tensor) or weights.shape != (len(sigmas), 2):
                raise ConfigError(
                    f"advantage.schedule.target: {target} must return a tensor of shape "
                    f"({len(sigmas)}, 2), got {getattr(weights, 'shape', weights)!r}"
                )
            return weights


def one_sided(sigmas: Tensor, steps: range, config: AdvantageConfig) -> str | None:
    """What is wrong with a schedule that shall move the weight from one objective to the other,
    if the same one leads in all ``steps`` that may be trained, of the noise levels ``[T + 1]``."""
    shaping = config.find_shaping()
    shaping = SHAPINGS[shaping] if isinstance(shaping, str) else shaping
    if isinstance(config.schedule, ConstantSchedule) or not shaping.weighted_sum:
        return None
    prompt = _schedule(sigmas[:-1], config)[steps.start : steps.stop, 1]
    if prompt.min() <= 0.5 <= prompt.max():
        return None
    leader, other = ("prompt", "identity") if prompt.min() > 0.5 else ("identity", "prompt")
    return (
        f"advantage.schedule: {leader} has more weight than {other} in every step that is trained "
        f"(prompt: {prompt.min():.2f} to {prompt.max():.2f}, at noise levels "
        f"{sigmas[steps.start]:.2f} to {sigmas[steps.stop - 1]:.2f}); move the schedule into these "
        "steps, raise rollout.num_steps, or write a constant one if that is meant"
    )


def assign_credit(
    scores: Tensor,
    group_ids: Tensor,
    sigmas: Tensor,
    config: AdvantageConfig,
    rewards: Sequence[RewardConfig],
    objectives: Sequence[str],
    factors: Mapping[str, float] | None = None,
) -> Advantages:
    """Scores ``[B, R]`` -> advantages of all T steps of the schedule ``sigmas`` ``[T + 1]``.

    Weights of objectives are multiplied by their ``factors``, if there are any.
    """
    per_objective = objective_advantages(scores, group_ids, rewards, objectives)
    weights = objective_weights(sigmas[:-1], config, objectives)
    if factors:
        weights = weights * weights.new_tensor([factors[name] for name in objectives])
    per_step = shape_advantages(
        config.find_shaping(),
        per_objective,
        weights,
        gamma=DEFAULT_GAMMA if config.gamma is None else config.gamma,
        center=config.center,
        group_ids=group_ids,
        clip=config.clip,
    )
    return Advantages(
        per_objective=per_objective, per_step=per_step, valid=~per_objective.isnan().any(1)
    )


def share_statistics(advantages: Advantages, objectives: Sequence[str]) -> dict[str, float]:
    """Shares of valid samples by the signs of their identity and prompt advantages."""
    if not {"identity", "prompt"} <= set(objectives) or not advantages.valid.any():
        return {}
    rows = advantages.per_objective[advantages.valid]
    identity, prompt = (rows[:, objectives.index(name)] for name in ("identity", "prompt"))
    return {
        "share/conflicted": (identity * prompt < 0).float().mean().item(),
        "share/identity_only": ((identity > 0) & (prompt < 0)).float().mean().item(),
        "share/prompt_only": ((identity < 0) & (prompt > 0)).float().mean().item(),
        "share/both_positive": ((identity > 0) & (prompt > 0)).float().mean().item(),
        "share/both_negative": ((identity < 0) & (prompt < 0)).float().mean().item(),
    }
