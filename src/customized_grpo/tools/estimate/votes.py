"""How often a run asks people."""

from __future__ import annotations

from dataclasses import dataclass

from customized_grpo.config import RunConfig
from customized_grpo.rewards.votes import VotesConfig

_SECONDS = 10  # for one vote


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteCount:
    """What one reward asks of all people together."""

    label: str
    per_rollout: int
    """Votes that a rollout waits for."""
    votes: int
    """Of the whole run."""
    group_size: int
    """Pictures to choose from."""

    def __str__(self) -> str:
        return (
            f"{self.label}: {self.per_rollout:,} votes of people for each rollout, each on "
            f"{self.group_size} pictures; {self.votes:,} in all, "
            f"{self.votes * _SECONDS / 3600:.2g} h at {_SECONDS} s each (assumed)"
        )


def count_votes(config: RunConfig) -> tuple[VoteCount, ...]:
    """Those of a run that gets all the votes that it waits for."""
    rollout, train = config.rollout, config.train
    rollouts = train.num_updates // train.inner_updates
    return tuple(
        VoteCount(
            label=reward.label,
            per_rollout=rollout.prompts_per_rollout * reward.min_votes,
            votes=rollout.prompts_per_rollout * reward.min_votes * rollouts,
            group_size=rollout.group_size,
        )
        for reward in config.rewards
        if isinstance(reward, VotesConfig)
    )
