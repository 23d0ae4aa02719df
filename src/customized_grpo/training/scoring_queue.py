"""Rewards of one micro-batch run while the next one is being sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import BoundedSemaphore

import torch
from torch import Tensor

from customized_grpo.types import Example, RewardScores

Score = Callable[[Tensor, Sequence[Example]], RewardScores]


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

    def put(self, images: Tensor, examples: Sequence[Example]) -> None:
        """Hands over a micro-batch; waits while the queue is full.

        Raises:
            Exception: what the reward raised on an earlier one; nothing more is worth sampling.
        """
        self._places.acquire()
        future = self._worker.submit(self._score, images, examples)
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
            errors=tuple(error for part in parts for error in part.errors),
        )
