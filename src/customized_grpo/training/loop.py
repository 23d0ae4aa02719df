"""The loop: examples -> rollout -> scores -> advantages -> loss -> step.

``Loop.iterate`` is one rollout and its updates (Customized-GRPO, arXiv:2510.18263), from top to
bottom. What keeps a run alive around it (begin, resume, save, stop, rescue) is in ``session``; the
mathematics is in ``customized_grpo.ops``. Axes: P prompts, G samples of a group, B = P G samples,
b of them this process's own, K trained of T denoising steps, M (sample, step) pairs, N objectives,
R rewards.

Several processes draw the same random numbers and compute a share of the samples each. What they
compute meets at two points: once a rollout the scores, as an advantage needs its whole group, and
once an update the gradients.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from customized_grpo.config import BalanceSettings, LossConfig, MeasuredSchedule, RunConfig
from customized_grpo.data.base import DataSource
from customized_grpo.errors import RewardError, everywhere
from customized_grpo.generators.base import Conditioning, Generator
from customized_grpo.rewards.base import RewardSet
from customized_grpo.runs.ema import Ema
from customized_grpo.runs.interrupts import Interrupts
from customized_grpo.runs.log import RunLog
from customized_grpo.runs.ranks import ALONE, Ranks
from customized_grpo.runs.sharding import is_sharded, whole
from customized_grpo.training.advantages import (
    NOTHING,
    assign_credit,
    disagreement,
    gate_statistics,
    mean_levels,
    objective_weights,
    suspects,
)
from customized_grpo.training.algorithms import make_algorithm
from customized_grpo.training.balance import Gradients, rebalance
from customized_grpo.training.build import make_optimizer
from customized_grpo.training.loss import accumulate_gradient
from customized_grpo.training.measure import measure_noise
from customized_grpo.training.samples import ScoredSampler
from customized_grpo.training.sizes import Sizes
from customized_grpo.training.validation import known_mean, rollout_metrics
from customized_grpo.types import Advantages, Batch, Example, RewardScores, Rollout

logger = logging.getLogger("customized_grpo")

_SEED_STRIDE = 1_000_003  # more than the rollouts of any run: no two seeds share a noise


@dataclass(frozen=True, kw_only=True, slots=True)
class Experience:
    """What a rollout leaves for its updates, of this process's samples ``[b]``."""

    rows: Tensor
    """Indices ``[b]`` int64 of them in all samples ``[B]``."""
    rollout: Rollout
    advantages: Advantages
    conditioning: Conditioning
    metrics: dict[str, float]
    factors: dict[str, float]
    """By objective: what ``advantage.balance`` has multiplied its weight by."""


def inner_rows(config: RunConfig) -> list[Tensor]:
    """Rows ``[B / inner_updates]`` int64 of every update of a rollout: whole groups, or a share of
    the samples of every group (``train.split``)."""
    rollout, train = config.rollout, config.train
    num_prompts, group_size = rollout.prompts_per_rollout, rollout.group_size
    rows = torch.arange(num_prompts * group_size).view(num_prompts, group_size)
    parts = rows.chunk(train.inner_updates, dim=0 if train.split == "groups" else 1)
    return [part.flatten() for part in parts]


class Loop:
    """Holds what an update reads and changes.

    ``guard`` is told of an update whose gradient norm is not finite; it raises if that must not be
    skipped.
    """

    def __init__(
        self,
        config: RunConfig,
        data: DataSource,
        generator: Generator,
        rewards: RewardSet,
        log: RunLog,
        interrupts: Interrupts,
        guard: Callable[[Batch, Conditioning, bool], None],
        ranks: Ranks = ALONE,
        evaluators: RewardSet | None = None,
    ) -> None:
        self.config, self.data, self.rewards = config, data, rewards
        self.evaluators = evaluators
        """They say which samples the KL holds for; None: it holds for all."""
        self.log, self.guard, self.ranks = log, guard, ranks
        self.sizes = Sizes(generator, config, come_again=bool(data.listed()))
        self.policy = self.sizes.own.policy
        """Of the size of the rollout under way."""
        self.algorithm = make_algorithm(self.policy, config)
        self.sample = ScoredSampler(config, self.algorithm, rewards, log, interrupts, ranks)
        self.parameters = [p for p in generator.transformer.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, config.train)
        decay = config.train.ema_decay
        self.ema = None if decay is None else Ema(generator.transformer, decay)
        self.is_sharded = is_sharded(generator.transformer)
        self.micro_batch_size = config.train.micro_batch_size
        """Halved where it does not fit the memory."""
        self.factors: dict[str, float] = {}
        """See Experience, after the last rollout that is used up; empty: all 1."""
        if config.advantage.balance is not None:
            self.factors = dict.fromkeys(rewards.objectives, 1.0)
        self.mid_rollout = False
        """Some of a rollout's updates are done and some are not: no point to resume from."""
        self.measured = NOTHING
        """Of the model that the run began with; the same in all processes."""

    def measure(self) -> None:
        """Finds out what the noise of each step moves, for a ``measured`` schedule that does not
        know it yet.

        Raises:
            RewardError: if no image of a step could be scored by a reward.
        """
        schedule, config = self.config.advantage.schedule, self.config
        if not isinstance(schedule, MeasuredSchedule) or self.measured.noise_shares:
            return
        logger.info("measuring what the noise of each step moves")
        shares = measure_noise(
            config,
            schedule,
            config.seed * _SEED_STRIDE + _SEED_STRIDE - 1,
            self.data.training(0, schedule.num_prompts),
            self.sizes.own.encode,
            partial(self.sample, self.policy),
            self.ranks,
        )
        self.measured = replace(self.measured, noise_shares=shares)

    def iterate(self, number: int) -> Iterator[dict[str, float]]:
        """Rollout ``number`` and its updates; yields the numbers of each update when it is done."""
        experience = self.collect(number)
        metrics = experience.metrics
        for inner, rows in enumerate(inner_rows(self.config)):
            with self.log.timed("update"):
                stats = self.update(
                    self._batch_of(experience, rows), experience.conditioning, is_first=inner == 0
                )
            yield metrics | stats
            metrics = {}  # the rollout's numbers stand in the row of its first update
        self.algorithm.after_rollout((number + 1) * self.config.train.inner_updates)
        self.factors = experience.factors
        self.mid_rollout = False  # not before the caller has taken in the last update

    def collect(self, number: int) -> Experience:
        """Samples the groups of rollout ``number``, scores them and assigns the advantages."""
        config, objectives = self.config, self.rewards.objectives
        balance = config.advantage.balance
        num_prompts, group_size = config.rollout.prompts_per_rollout, config.rollout.group_size
        rng = torch.Generator().manual_seed(config.seed * _SEED_STRIDE + number)
        all_group_ids = torch.arange(num_prompts).repeat_interleave(group_size)  # [B]
        # Update by update, so that each of them is shared evenly.
        shares = self.ranks.split(inner_rows(config))
        mine = shares[self.ranks.rank]
        my_groups, place = all_group_ids[mine].unique(return_inverse=True)
        with self.log.timed("data"):
            prompts = self.data.training(number, num_prompts)
            sized = self.sizes.of(number, prompts)
            self.policy = sized.policy
            per_prompt = sized.encode([prompts[group] for group in my_groups.tolist()])
        rollout, scores = self.sample(
            self.policy, prompts, per_prompt, rng, shares, self.algorithm.rollout
        )
        device = rollout.images.device
        group_ids, conditioning = all_group_ids.to(device), per_prompt.take(place.to(device))
        for error in scores.errors:
            logger.warning("rollout %d: %s", number, error)
        if number == 0:  # sampled by the model that the run began with: what `gate` compares with
            levels = mean_levels(scores.scores, config.rewards)
            self.measured = replace(self.measured, levels=levels)
        credit = partial(
            assign_credit,
            scores.scores,
            group_ids,
            rollout.sigmas,
            config.advantage,
            config.rewards,
            objectives,
            self.measured,
        )
        advantages, factors, balanced = credit(self.factors), self.factors, {}
        if not advantages.valid.any():
            text = "; ".join(scores.errors) or "all scores are NaN"
            raise everywhere(
                RewardError(f"rewards: no image of rollout {number} could be scored; {text}")
            )
        if balance is not None and number % balance.every == 0:
            # The gradients that set the factors need advantages, which the factors then correct.
            own = advantages.take(mine.to(device))
            factors, balanced = self._rebalance(balance, rollout, own, conditioning)
            advantages = credit(factors)
        self.log.advantages(number, advantages.per_objective, objectives)
        metrics = rollout_metrics(scores, advantages, group_ids, objectives) | balanced
        if self.evaluators is not None:
            judged = self._evaluate(self.evaluators, rollout, prompts, shares)
            gap = disagreement(scores.scores, config.rewards, judged, config.evaluators, group_ids)
            advantages = replace(advantages, kl_gate=suspects(gap, config.loss.kl_share))
            metrics |= known_mean("disagreement", gap.clamp(min=0))
            numbers = self.evaluators.metrics()
            metrics |= {f"evaluator/{name}": value for name, value in numbers.items()}
        metrics |= gate_statistics(scores.scores, config.advantage, config.rewards, self.measured)
        metrics |= {f"reward/{name}": value for name, value in self.rewards.metrics().items()}
        return Experience(
            rows=mine,
            rollout=rollout,
            advantages=advantages.take(mine.to(device)),
            conditioning=conditioning,
            metrics=metrics,
            factors=factors,
        )

    def _evaluate(
        self,
        evaluators: RewardSet,
        rollout: Rollout,
        prompts: Sequence[Example],
        shares: Sequence[Tensor],
    ) -> Tensor:
        """What the evaluators say of the samples of all processes ``[B, E]``."""
        size, parts = self.algorithm.rollout.batch_size or len(rollout.images), list[RewardScores]()
        batches = zip(rollout.images.split(size), rollout.group_ids.split(size), strict=True)
        with self.log.timed("evaluators"):
            for images, groups in batches:
                self.sample.interrupts.check_alone()
                parts.append(evaluators.score(images, [prompts[g] for g in groups.tolist()]))
        for error in dict.fromkeys(error for part in parts for error in part.errors):
            logger.warning("evaluators: %s", error)
        return self.ranks.all_gather(torch.cat([part.scores for part in parts]), shares)

    def _rebalance(
        self,
        settings: BalanceSettings,
        rollout: Rollout,
        advantages: Advantages,
        conditioning: Conditioning,
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Factors of the objectives' weights, and numbers, from a gradient of the whole rollout for
        each objective, by the model as it is."""
        rows = torch.arange(len(rollout.images), device=rollout.images.device)
        loss, size = self.config.loss.policy_only(), self.micro_batch_size

        def gradient(per_step: Tensor) -> Gradients:
            part = replace(advantages, per_step=per_step)
            batch = self.algorithm.batch(self.policy, rollout, part, conditioning, rows)
            self._gradient(batch, conditioning, loss, pinned=True)
            return [parameter.grad for parameter in self.parameters]

        weights = objective_weights(
            rollout.sigmas[:-1], self.config.advantage, self.rewards.objectives, self.measured
        )
        with self.log.timed("balance"):
            factors, numbers = rebalance(
                self.factors,
                gradient,
                advantages.per_objective,
                weights,
                self.algorithm.steps,
                settings,
                self.ranks,
                has_rest=self.algorithm.old is not None,
            )
        self.optimizer.zero_grad(set_to_none=True)
        if self.micro_batch_size is not None and self.micro_batch_size != size:
            numbers["micro_batch_size"] = float(self.micro_batch_size)
        return factors, numbers

    def _batch_of(self, experience: Experience, rows: Tensor) -> Batch:
        rollout = experience.rollout
        mine = torch.isin(experience.rows, rows).nonzero()[:, 0].to(rollout.group_ids.device)
        advantages, conditioning = experience.advantages, experience.conditioning
        return self.algorithm.batch(self.policy, rollout, advantages, conditioning, mine)

    def _gradient(
        self, batch: Batch, conditioning: Conditioning, loss: LossConfig, *, pinned: bool
    ) -> dict[str, float]:
        """Leaves the gradient at the parameters; remembers what fitted the memory."""
        stats = accumulate_gradient(
            self.policy,
            batch,
            conditioning,
            loss,
            pinned=pinned,
            micro_batch_size=self.micro_batch_size,
            ranks=self.ranks,
        )
        if "micro_batch_size" in stats:
            self.micro_batch_size = int(stats["micro_batch_size"])
        return stats

    def update(
        self, batch: Batch, conditioning: Conditioning, *, is_first: bool
    ) -> dict[str, float]:
        """One optimizer step on the pairs of ``batch``, those of all processes together.

        The first update after a rollout is on policy: its ratio is 1, and with ``loss.pin_ratio``
        exactly so, whatever batch shape, merged weights or kernels the rollout was sampled with.
        """
        train, loss = self.config.train, self.config.loss
        is_pinned = loss.pin_ratio and is_first
        stats = self._gradient(batch, conditioning, loss, pinned=is_pinned)
        if not is_first:  # off policy: the ratio moves by itself
            stats.pop("mismatch", None)  # absent if no sample was valid
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        stats["grad_norm"] = whole(norm).item()
        is_finite = math.isfinite(stats["grad_norm"])
        if not is_finite:  # not clipped: every gradient times the norm would be as bad
            self.guard(batch, conditioning, is_pinned)
        self.mid_rollout = True  # after the guard, which may raise: then nothing was done
        if is_finite:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, train.max_grad_norm, norm)
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update()
        self.optimizer.zero_grad(set_to_none=True)  # no memory of theirs while pictures are made
        return {**stats, "skipped_updates": float(not is_finite)}
