"""What the noise of each step moves, measured before the first update for the measured schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from customized_grpo.config import MeasuredSchedule, RolloutConfig, RunConfig
from customized_grpo.errors import RewardError, everywhere
from customized_grpo.generators.base import Conditioning
from customized_grpo.ops import noise_variance
from customized_grpo.runs.ranks import Ranks
from customized_grpo.training.advantages import shares_of_noise
from customized_grpo.training.rollout import one_step_rollouts
from customized_grpo.types import Example, RewardScores, Rollout

Sample = Callable[
    [Sequence[Example], Conditioning, torch.Generator, Sequence[Tensor], RolloutConfig],
    tuple[Rollout, RewardScores],
]
"""Samples this process's share of a rollout; the scores are all processes'."""


def measure_noise(
    config: RunConfig,
    schedule: MeasuredSchedule,
    seed: int,
    prompts: Sequence[Example],
    encode: Callable[[Sequence[Example]], Conditioning],
    sample: Sample,
    ranks: Ranks,
) -> tuple[tuple[float, float], ...]:
    """``Measured.noise_shares``, from ``schedule.num_samples`` pictures of every prompt for every
    step with noise.

    Raises:
        RewardError: if no image of a step could be scored by a reward.
    """
    group_ids = torch.arange(len(prompts)).repeat_interleave(schedule.num_samples)
    shares = ranks.split([torch.arange(len(group_ids))])
    my_groups = group_ids[shares[ranks.rank]].unique()
    per_prompt = encode([prompts[group] for group in my_groups.tolist()])
    variances = torch.zeros(config.rollout.num_steps, len(config.rewards))
    names: Sequence[str] = ()
    for step, one in one_step_rollouts(config.rollout, schedule.num_samples).items():
        # The same noise whatever the step: what differs is the step.
        rng = torch.Generator().manual_seed(seed)
        _, scores = sample(prompts, per_prompt, rng, shares, one)
        variances[step], names = noise_variance(scores.scores.cpu(), group_ids), scores.names
    if bool(variances.isnan().any()):
        unknown = [names[i] for i in variances.isnan().any(0).nonzero()[:, 0]]
        raise everywhere(
            RewardError(f"rewards: {', '.join(unknown)} could not score what a step moves")
        )
    return shares_of_noise(variances, config.rewards)
