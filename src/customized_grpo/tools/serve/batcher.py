"""Requests that wait for a reward are scored together, in the order they came."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from customized_grpo.errors import CustomizedGRPOError
from customized_grpo.rewards.base import PartialFailures, Reward
from customized_grpo.types import Example

logger = logging.getLogger("customized_grpo")

Scored = tuple[float | None, str | None]
"""Score and error of one image; one of them is None."""


class Busy(Exception):
    """The queue is full; ask again after ``seconds``."""

    def __init__(self, text: str, seconds: int) -> None:
        super().__init__(text)
        self.seconds = seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    images: Tensor
    examples: list[Example]
    result: asyncio.Future[list[Scored]]


class Batcher:
    """A bounded queue in front of one reward, which is called on one thread.

    What came while the reward was busy makes up its next batch: nobody waits for company.
    """

    def __init__(
        self, reward: Reward, device: torch.device, max_images: int, max_waiting: int
    ) -> None:
        self._reward, self._device = reward, device
        self._max_images, self._max_waiting = max_images, max_waiting
        self._jobs: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward")
        self._seconds = 1.0

    def start(self) -> None:
        """Begins to work, in the running event loop."""
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Ends; to be called when nobody waits any more."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()

    async def submit(self, images: Tensor, examples: list[Example]) -> list[Scored]:
        """Scores ``[B, 3, H, W]``; one that is cancelled before its turn is never scored.

        Raises:
            Busy: if the queue is full; with the time that the last batch took.
            Exception: what the reward raised that no reward should.
        """
        waiting = sum(len(job.examples) for job in self._jobs if not job.result.cancelled())
        if waiting + len(examples) > self._max_waiting:
            raise Busy(
                f"{waiting} images are waiting, at most {self._max_waiting} may",
                max(1, math.ceil(self._seconds)),
            )
        result: asyncio.Future[list[Scored]] = asyncio.get_running_loop().create_future()
        self._jobs.append(_Job(images=images, examples=examples, result=result))
        self._arrived.set()
        return await result

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            started = time.monotonic()
            outcomes = await loop.run_in_executor(self._thread, self._score_jobs, batch)
            self._seconds = time.monotonic() - started
            for job, outcome in zip(batch, outcomes, strict=True):
                if job.result.cancelled():
                    continue
                if isinstance(outcome, Exception):
                    job.result.set_exception(outcome)
                else:
                    job.result.set_result(outcome)

    def _next_batch(self) -> list[_Job]:
        """Jobs from the front while their pictures have one size and there is room."""
        batch: list[_Job] = []
        count = 0
        while self._jobs:
            job = self._jobs[0]
            if batch and (
                job.images.shape[1:] != batch[0].images.shape[1:]
                or count + len(job.examples) > self._max_images
            ):
                break
            self._jobs.popleft()
            if not job.result.cancelled():
                batch.append(job)
                count += len(job.examples)
        return batch

    def _score_jobs(self, batch: Sequence[_Job]) -> list[list[Scored] | Exception]:
        examples = [example for job in batch for example in job.examples]
        try:  # the device may have no room left for the pictures either
            images = torch.cat([job.images for job in batch]).to(self._device)
            scored = iter(score_images(self._reward, images, examples))
        except Exception as error:
            if len(batch) > 1:  # one request must not spoil the others
                return [outcome for job in batch for outcome in self._score_jobs([job])]
            logger.exception("a reward failed")
            return [error]
        return [[next(scored) for _ in job.examples] for job in batch]


@torch.no_grad()
def score_images(reward: Reward, images: Tensor, examples: Sequence[Example]) -> list[Scored]:
    """Scores of images ``[B, 3, H, W]``; a batch that fails is halved down to the culprits."""
    try:
        column = reward.score(images, examples)
    except CustomizedGRPOError as error:
        if len(examples) == 1:
            return [(None, " ".join(str(error).split()))]
        half = len(examples) // 2
        return [
            scored
            for part in (slice(None, half), slice(half, None))
            for scored in score_images(reward, images[part], examples[part])
        ]
    if column.shape != (len(examples),):
        raise ValueError(
            f"a reward must return one score per image, shape ({len(examples)},), got "
            f"{tuple(column.shape)}"
        )
    errors = reward.take_errors() if isinstance(reward, PartialFailures) else ()
    reason = "; ".join(errors) or "the reward gave no finite score"
    return [(v, None) if math.isfinite(v) else (None, reason) for v in column.float().tolist()]
