"""The model that `benchmarks/gpu.py` measures, and its clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any


@contextmanager
def watched(device: Any) -> Iterator[dict[str, float]]:
    """Seconds and bytes of what happens inside, from an idle device to an idle device."""
    import torch

    from customized_grpo.tools.estimate.devices import synchronize

    numbers: dict[str, float] = {}
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    yield numbers
    synchronize(device)
    numbers["seconds"] = time.perf_counter() - started
    if device.type == "cuda":
        numbers["bytes"] = torch.cuda.max_memory_allocated(device)


class World:
    """A generator that is trained, its rewards, and the pairs of a rollout of two steps.

    Making them is the warm-up: of the same batches as the measurements, rollout and update.
    """

    def __init__(self, config: Any, device: Any) -> None:
        import torch

        from customized_grpo.generators.cpu import use_stock_blocks
        from customized_grpo.rewards.base import RewardSet
        from customized_grpo.training.build import build_world, make_trainable

        self.config, self.device = config, device
        self.data, self.generator = build_world(config, device)
        self.rewards = RewardSet(config.rewards, device)
        torch.manual_seed(config.seed)
        make_trainable(self.generator, config)
        use_stock_blocks(self.generator.transformer)  # as on a GPU, also where there is none
        loop = self.loop(
            replace(config, rollout=replace(config.rollout, num_steps=2, num_trained_steps=1))
        )
        self.policy = loop.policy
        self.experience = loop.collect(0)
        batch = batch_of(self.experience)
        # Pairs of advantage 0 are not computed, and noise is the best that random weights draw.
        self.batch = replace(batch, advantage=torch.ones_like(batch.advantage))
        loop.update(self.batch, self.experience.conditioning, is_first=True)
        loop.optimizer.zero_grad(set_to_none=True)

    def loop(self, config: Any) -> Any:
        """The trainer's loop, with a log that waits for the device."""
        from customized_grpo.runs.interrupts import Interrupts
        from customized_grpo.training.loop import Loop

        log: Any = Stages(self.device)
        parts = (self.data, self.generator, self.rewards, log, Interrupts())
        return Loop(config, *parts, _refuse)

    def pairs(self, number: int) -> Any:
        """The first pairs of the batch, again and again if need be."""
        import torch

        rows = torch.arange(number, device=self.device) % len(self.batch.advantage)
        given = {f.name: getattr(self.batch, f.name) for f in fields(self.batch)}
        parts = {n: v[rows] for n, v in given.items() if isinstance(v, torch.Tensor)}
        return replace(self.batch, **parts)

    def velocity(self, samples: int) -> None:
        """A pass of the rollout."""
        import torch

        batch = self.pairs(samples)
        condition = self.experience.conditioning.take(batch.sample_index)
        with torch.no_grad():
            self.policy.velocity(batch.latents, batch.step_index, condition)

    def gradient(self, pairs: int, micro_batch_size: int) -> dict[str, float]:
        """A pass of the update, without the optimizer's step."""
        from customized_grpo.training.loss import accumulate_gradient

        stats = accumulate_gradient(
            self.policy,
            self.pairs(pairs),
            self.experience.conditioning,
            self.config.loss,
            pinned=True,
            micro_batch_size=micro_batch_size,
        )
        for parameter in self.generator.transformer.parameters():
            parameter.grad = None
        return stats

    def checkpointing(self, on: bool) -> None:
        """Whether activations are computed again in the backward pass."""
        transformer: Any = self.generator.transformer
        if on:
            transformer.enable_gradient_checkpointing()
        else:
            transformer.disable_gradient_checkpointing()


def batch_of(experience: Any) -> Any:
    """The pairs of a rollout of one group."""
    import torch

    from customized_grpo.config import GrpoAlgorithm
    from customized_grpo.training.loss import policy_batch

    rollout = experience.rollout
    rows = torch.arange(len(rollout.images), device=rollout.images.device)
    weights = torch.ones(len(rollout.sigmas) - 1, device=rows.device)
    losses = GrpoAlgorithm().losses
    return policy_batch(rollout, experience.advantages, rows, weights, losses)


class Stages:
    """The part of a run's log that a loop needs; seconds and bytes of every stage."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """See RunLog; it ends when the device has done what it was told."""
        with watched(self._device) as numbers:
            yield
        self.stages[stage] = numbers

    def advantages(self, *_: object) -> None:
        """Nothing."""


def _refuse(*_: object) -> None:
    raise RuntimeError("the gradient is not finite")
