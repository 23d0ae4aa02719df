"""A rollout and its scores: sampling, with scoring beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from customized_grpo.config import RolloutConfig, RunConfig
from customized_grpo.generators.base import Conditioning
from customized_grpo.rewards.base import RewardSet
from customized_grpo.runs.interrupts import Interrupts
from customized_grpo.runs.log import RunLog
from customized_grpo.runs.ranks import Ranks
from customized_grpo.training.algorithms import Algorithm
from customized_grpo.training.people import with_answers
from customized_grpo.training.policy import Policy
from customized_grpo.training.rollout import collect_rollout
from customized_grpo.training.scoring import (
    ScoringQueue,
    WholeGroups,
    gather_scores,
    settle_scores,
)
from customized_grpo.types import Example, RewardScores, Rollout


class ScoredSampler:
    """Samples with the weights that the algorithm samples with; scoring goes on meanwhile.

    ``seconds/reward`` is what scoring takes beyond sampling.
    """

    def __init__(
        self,
        config: RunConfig,
        algorithm: Algorithm,
        rewards: RewardSet,
        log: RunLog,
        interrupts: Interrupts,
        ranks: Ranks,
    ) -> None:
        self.config, self.algorithm, self.rewards = config, algorithm, rewards
        self.log, self.interrupts, self.ranks = log, interrupts, ranks

    def __call__(
        self,
        policy: Policy,
        prompts: Sequence[Example],
        per_prompt: Conditioning,
        rng: torch.Generator,
        shares: Sequence[Tensor],
        config: RolloutConfig,
    ) -> tuple[Rollout, RewardScores]:
        """This process's samples, and the scores of all processes' ``[B, R]``.

        Args:
            policy: samples.
            prompts: an example for every group, of all processes.
            per_prompt: the conditioning of the groups that this process has samples of.
            rng: of the noise.
            shares: rows ``[b]`` int64 of every process.
            config: how to sample.

        Raises:
            RewardError: if too many samples could not be scored.
            Interrupted: if a signal has come meanwhile.
        """
        with ScoringQueue(self.rewards.score) as queue:

            def put(images: Tensor, groups: Tensor) -> None:
                queue.put(images, [prompts[group] for group in groups.tolist()], groups)

            together = WholeGroups(put, config.group_size if self.rewards.has_groupwise else 1)

            def hand_over(images: Tensor, groups: Tensor) -> None:
                self.interrupts.check_alone()
                together(images, groups)

            with self.log.timed("rollout"), self.algorithm.sampling():
                rollout = collect_rollout(
                    policy,
                    per_prompt,
                    config,
                    rng,
                    keep_means=self.config.loss.needs_means,
                    on_images=hand_over,
                    rows=shares[self.ranks.rank],
                    num_groups=len(prompts),
                )
            with self.log.timed("reward"):
                scores = queue.result()
            scores = with_answers(
                scores, rollout, prompts, self.rewards, self.log, self.interrupts, self.ranks
            )
            with self.log.timed("reward"):
                scores = settle_scores(
                    scores,
                    rollout,
                    prompts,
                    self.rewards,
                    self.config.faults,
                    self.interrupts,
                    self.ranks,
                )
        for people in self.rewards.people:
            people.dismiss()
        return rollout, gather_scores(scores, self.ranks, shares)
