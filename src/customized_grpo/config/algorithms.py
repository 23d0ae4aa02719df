"""How samples and their advantages become a gradient: `algorithm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoAlgorithm:
    """Policy gradient on the noisy steps of the trajectories."""

    type: Literal["grpo"] = "grpo"
    """The paper's: what makes the steps of better samples more probable, see loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NftAlgorithm:
    """DiffusionNFT (arXiv:2509.16117): pictures are noised anew, and the model is led towards the
    better and away from the worse ones. No trajectory is kept, and any sampler will do.

    Each sample is trained at rollout.num_trained_steps noise levels of its own, drawn from the
    window or else from all steps of the sampler, with the advantage of that level.
    """

    type: Literal["nft"] = "nft"
    """On the forward process."""

    beta: PositiveFloat = 1.0
    """How far the policies that are fitted to good and bad samples are from the one that sampled,
    in parts of the step to the trained one: smaller = a stronger pull (paper: 1 or 0.1)."""

    old_decay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """The policy that samples keeps this share of itself after a rollout, and takes the rest from
    the trained one (paper: 0.5 or 0.999); 0 = the trained one samples. Above 0, or with several
    updates per rollout, it stays in memory (4 bytes per trained weight)."""

    old_decay_rate: NonNegativeFloat = 0.001
    """The share begins at 0 and grows by this per update, up to old_decay (paper: 0.001)."""

    def decay(self, num_updates: int) -> float:
        """The share after so many updates."""
        return min(self.old_decay_rate * num_updates, self.old_decay)


AlgorithmConfig = Annotated[GrpoAlgorithm | NftAlgorithm, Field(discriminator="type")]
