"""Scores of a rollout: rewards run beside the sampling, and where too many are lost to errors they
are asked for again.

The way of a score that is missing: ``RewardSet.score`` turns whatever a reward returned that is not
finite, or what it raised, into NaN; where more than ``faults.max_lost_rewards`` of a rollout is
lost, ``settle_scores`` asks again if there was an error, and stops the run in the end;
``objective_advantages`` leaves the sample out of its group's mean and makes its row NaN,
``Advantages.valid`` false; the loss (``loss.py``, ``forward.py``) leaves it out. No guess takes the
place of a score.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import BoundedSemaphore
from typing import Any

import torch
from torch import Tensor

from customized_grpo.config import FaultConfig
from customized_grpo.errors import RewardError, everywhere
from customized_grpo.rewards.base import RewardSet
from customized_grpo.runs.interrupts import Interrupts
from customized_grpo.runs.ranks import Ranks
from customized_grpo.types import Example, RewardScores, Rollout

logger = logging.getLogger("customized_grpo")

Score = Callable[..., RewardScores]


class ScoringQueue:
    """Scores micro-batches on one worker thread, in the order they were put.

    One worker, so that a reward is never entered twice at a time and the order is that of a loop.
    Leaving the context waits for the micro-batch under way and drops those that have not begun.
    """

    def __init__(self, score: Score, max_waiting: int = 2) -> None:
        """``max_waiting`` bounds the micro-batches held in memory besides the one under way."""
        self._score = score
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rewards")
        self._places = BoundedSemaphore(max_waiting + 1)
        self._futures: list[Future[RewardScores]] = []

    def __enter__(self) -> ScoringQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    def put(self, *batch: Any) -> None:
        """Hands over a micro-batch as ``score`` takes it; waits while the queue is full.

        Raises:
            Exception: what the reward raised on an earlier one; nothing more is worth sampling.
        """
        self._places.acquire()
        future = self._worker.submit(self._score, *batch)
        # A place is free again whether the reward succeeds, fails or is dropped: never a deadlock.
        future.add_done_callback(lambda _: self._places.release())
        self._futures.append(future)
        for earlier in self._futures:
            if earlier.done():
                earlier.result()

    def result(self) -> RewardScores:
        """Scores of everything that was put, in that order; waits for them.

        Raises:
            Exception: what the reward raised.
        """
        parts = [future.result() for future in self._futures]
        return RewardScores(
            scores=torch.cat([part.scores for part in parts]),
            names=parts[0].names,
            copy_gap=torch.cat([part.copy_gap for part in parts]),
            errors=tuple(error for part in parts for error in part.errors),
        )


class WholeGroups:
    """Hands images on in whole groups, in order, and keeps what is over for the next call."""

    def __init__(self, put: Callable[[Tensor, Tensor], None], group_size: int) -> None:
        """``put`` takes images ``[b, 3, H, W]`` and their groups ``[b]``."""
        self._put, self._size = put, group_size
        self._kept: tuple[Tensor, ...] = ()

    def __call__(self, images: Tensor, groups: Tensor) -> None:
        """Images and groups as ``collect_rollout`` has them, group after group."""
        new = (images, groups)
        if self._kept:
            new = tuple(torch.cat(pair) for pair in zip(self._kept, new, strict=True))
        whole = len(new[0]) // self._size * self._size
        self._kept = tuple(part[whole:].clone() for part in new)
        if whole:
            self._put(new[0][:whole], new[1][:whole])


def settle_scores(
    scores: RewardScores,
    rollout: Rollout,
    prompts: Sequence[Example],
    rewards: RewardSet,
    faults: FaultConfig,
    interrupts: Interrupts,
    ranks: Ranks,
) -> RewardScores:
    """Scores with few enough gaps; where there are more, those that were lost to an error are asked
    for again after longer and longer pauses.

    A sample whose own latents or log-probability are not finite gets NaN: it is no sample of the
    policy.

    Raises:
        RewardError: if too much is still missing at the end.
        Interrupted: if a signal has come meanwhile.
    """
    pauses = iter(faults.reward_pauses)
    while True:
        is_lost = scores.scores.isnan().any(1)
        lost_share = ranks.sum(int(is_lost.sum())) / ranks.sum(len(is_lost))
        if lost_share <= faults.max_lost_rewards:
            is_finite = rollout.log_probs.isfinite().all(1)
            is_finite &= rollout.final_latents.flatten(1).isfinite().all(1)
            return replace(scores, scores=scores.scores.where(is_finite[:, None], torch.nan))
        text = "; ".join(scores.errors) or "all scores of these images are NaN"
        what = f"{lost_share:.0%} of the rollout could not be scored: {text}"
        has_failed = ranks.any(bool(scores.errors))  # a NaN without a reason stays one
        pause = next(pauses, None) if has_failed else None
        if pause is None:
            raise everywhere(RewardError(f"rewards: {what}"))
        logger.warning("%s; trying again in %g s", what, pause)
        interrupts.sleep(pause)
        interrupts.check_together()
        groups = rollout.group_ids
        if rewards.has_groupwise:  # a rank means nothing without the others
            is_lost = torch.isin(groups, groups[is_lost])
        rows = is_lost.nonzero()[:, 0]
        if not len(rows):
            continue
        examples = [prompts[group] for group in groups[rows].tolist()]
        again = rewards.score(rollout.images[rows], examples, groups[rows])
        filled, gap = scores.scores.clone(), scores.copy_gap.clone()
        filled[rows], gap[rows] = again.scores, again.copy_gap
        scores = replace(again, scores=filled, copy_gap=gap)


def gather_scores(scores: RewardScores, ranks: Ranks, shares: Sequence[Tensor]) -> RewardScores:
    """The scores of all processes, in the order of the rows in ``shares``; errors are one's own."""
    columns = torch.cat([scores.scores, scores.copy_gap[:, None]], 1)
    whole = ranks.all_gather(columns, shares)
    return replace(scores, scores=whole[:, :-1], copy_gap=whole[:, -1])
