"""How samples and their advantages become a gradient: `algorithm`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from customized_grpo.config.plugs import AlgorithmConfig

if TYPE_CHECKING:
    from customized_grpo.types import ForwardTerms, PairLosses, PolicyTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoAlgorithm(AlgorithmConfig):
    """Policy gradient on the noisy steps of the trajectories."""

    is_affine: ClassVar[bool] = True

    type: str = "grpo"
    """The paper's: what makes the steps of better samples more probable, see loss."""

    def losses(self, terms: PolicyTerms, /) -> PairLosses:
        """PPO's clipped surrogate, or Flow-DPPO's masked one where ``loss.kl_mask`` is given."""
        from customized_grpo.ops import clipped_surrogate, masked_surrogate

        pairs = terms.log_prob, terms.old_log_prob, terms.advantage
        if terms.kl_mask is None:
            return clipped_surrogate(*pairs, terms.clip_range, 1.0)
        assert terms.divergence is not None
        return masked_surrogate(*pairs, terms.divergence, terms.kl_mask, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardAlgorithm(AlgorithmConfig):
    """Pictures are noised anew: no trajectory is kept, and any sampler will do.

    Each sample is trained at rollout.num_trained_steps noise levels of its own, drawn from the
    window or else from all steps of the sampler, with the advantage of that level.
    """

    old_decay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """The policy that samples keeps this share of itself after a rollout, and takes the rest from
    the trained one (NFT's paper: 0.5 or 0.999; in AWM's code 0.3 for old_weight alone, while the
    trained one samples); 0 = the trained one samples. Above 0, or with several updates per
    rollout, it stays in memory (4 bytes per trained weight)."""

    old_decay_rate: NonNegativeFloat = 0.001
    """The share begins at 0 and grows by this per update, up to old_decay (NFT's: 0.001)."""

    def decay(self, num_updates: int) -> float:
        """The share after so many updates."""
        return min(self.old_decay_rate * num_updates, self.old_decay)

    @abstractmethod
    def losses(self, terms: ForwardTerms, /) -> PairLosses:
        """As in ``AlgorithmConfig``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NftAlgorithm(ForwardAlgorithm):
    """DiffusionNFT (arXiv:2509.16117): the model is led towards the better and away from the worse
    pictures, noised anew. No trajectory is kept, and any sampler will do."""

    is_affine: ClassVar[bool] = True

    type: Literal["nft"] = "nft"
    """On the forward process."""

    beta: PositiveFloat = 1.0
    """How far the policies that are fitted to good and bad samples are from the one that sampled,
    in parts of the step to the trained one: smaller = a stronger pull (paper: 1 or 0.1)."""

    def losses(self, terms: ForwardTerms, /) -> PairLosses:
        """``ops.nft_loss``."""
        from customized_grpo.ops import nft_loss

        velocities = terms.velocity, terms.old_velocity, terms.target
        return nft_loss(*velocities, terms.sigma, terms.advantage, self.beta, terms.clip), {}


@dataclass(frozen=True, slots=True, kw_only=True)
class AwmAlgorithm(ForwardAlgorithm):
    """Advantage weighted matching (AWM, arXiv:2509.25050): GRPO's policy gradient with the loss of
    pretraining on the samples, noised anew, as their log-probability. No trajectory is kept.

    Advantages are divided by advantage.clip, as in the authors' code.
    """

    type: Literal["awm"] = "awm"
    """On the forward process."""

    power: Annotated[float, Field(gt=0, le=1)] = 0.25
    """The log-probability of a sample at a noise level is -sigma error^power / power, of the mean
    squared error of its velocity: 1 = the error itself, less = large errors count less (code:
    0.25)."""

    clip_range: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """PPO's clip of the ratio to the policy that sampled (the code's 1 cuts above 2 alone)."""

    old_weight: NonNegativeFloat = 1.0
    """Weight of the mean squared distance to the velocities of the policy that sampled, without
    which others report collapse (code: 1)."""

    def losses(self, terms: ForwardTerms, /) -> PairLosses:
        """PPO's clipped surrogate of ``ops.matching_log_prob``, and the distance."""
        from customized_grpo.ops import clipped_surrogate, matching_log_prob

        log_prob, old_log_prob = (
            matching_log_prob(velocity, terms.target, terms.sigma, self.power)
            for velocity in (terms.velocity, terms.old_velocity)
        )
        advantage = terms.advantage / terms.clip
        loss, stats = clipped_surrogate(log_prob, old_log_prob, advantage, self.clip_range, 1.0)
        if self.old_weight:
            distance = (terms.velocity - terms.old_velocity).square().flatten(1).mean(1)
            loss = loss + self.old_weight * distance.sum()
        return loss, stats
