"""The algorithms: who samples, and what an update trains on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

from customized_grpo.config import ForwardAlgorithm, RolloutConfig, RunConfig
from customized_grpo.generators.base import Conditioning
from customized_grpo.runs.ema import Ema
from customized_grpo.runs.sharding import is_sharded
from customized_grpo.training.forward import Forward
from customized_grpo.training.loss import policy_batch
from customized_grpo.training.policy import Policy
from customized_grpo.training.rollout import noisy_steps
from customized_grpo.types import Advantages, Batch, PolicyBatch, Rollout


class Algorithm(Protocol):
    """What differs between the kinds of algorithms; the losses are in the batch."""

    rollout: RolloutConfig
    """How a rollout is sampled."""
    steps: range
    """Which steps of the schedule may be trained."""
    old: Ema | None
    """The weights that sample, where they are others than those that are trained."""

    def sampling(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that sample."""
        ...

    def batch(
        self,
        policy: Policy,
        rollout: Rollout,
        advantages: Advantages,
        conditioning: Conditioning,
        rows: Tensor,
    ) -> Batch:
        """What an update of the samples ``rows`` (int64) of the rollout by ``policy`` is computed
        from.

        Invalid samples are left out; or, where the model is sharded and a pass is a meeting of all
        processes, kept with weight 0.
        """
        ...

    def after_rollout(self, num_updates: int) -> None:
        """Is told when a rollout is used up, and how many updates there have been."""
        ...


class Grpo:
    """See ``Algorithm``: transitions of the trajectories, sampled by what is trained."""

    old: Ema | None = None

    def __init__(self, policy: Policy, config: RunConfig) -> None:
        self.rollout, self.steps = config.rollout, noisy_steps(config.rollout)
        self._loss, self._losses = config.loss, config.algorithm.losses
        self._is_sharded = is_sharded(policy.generator.transformer)

    def sampling(self) -> AbstractContextManager[None]:
        """Nothing changes."""
        return nullcontext()

    def batch(
        self,
        policy: Policy,
        rollout: Rollout,
        advantages: Advantages,
        conditioning: Conditioning,
        rows: Tensor,
    ) -> PolicyBatch:
        """The transitions of samples ``rows``."""
        loss = self._loss
        weights = policy.step_weights(loss.step_weight, self.steps, loss.ratio_norm)
        return policy_batch(rollout, advantages, rows, weights, self._losses, self._is_sharded)

    def after_rollout(self, num_updates: int) -> None:
        """Nothing is kept."""


def make_algorithm(policy: Policy, config: RunConfig) -> Algorithm:
    """The algorithm of a run."""
    if isinstance(config.algorithm, ForwardAlgorithm):
        return Forward(policy, config, config.algorithm)
    return Grpo(policy, config)
