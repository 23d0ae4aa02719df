"""DiffusionNFT (arXiv:2509.16117) and AWM (arXiv:2509.25050): pictures noised anew, and an older
policy that samples.

Nothing of a trajectory is kept. Each sample is trained at noise levels of its own, with the
advantage that it has there: so a schedule of the objectives' weights, TDW for one, holds by noise
level, as for GRPO.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from customized_grpo.config import ForwardAlgorithm, RunConfig
from customized_grpo.generators.base import Conditioning, keeping
from customized_grpo.generators.cpu import lora_merged
from customized_grpo.ops import noised
from customized_grpo.runs.ema import Ema
from customized_grpo.runs.sharding import is_sharded
from customized_grpo.training.policy import Policy
from customized_grpo.types import Advantages, ForwardBatch, Rollout


class Forward:
    """See ``algorithms.Algorithm``."""

    def __init__(self, policy: Policy, config: RunConfig, settings: ForwardAlgorithm) -> None:
        self._config, self._settings = config, settings
        self.rollout = replace(config.rollout, num_trained_steps=0)  # keeps no transition
        self.steps = range(*config.rollout.window or (0, config.rollout.num_steps))
        transformer = policy.generator.transformer
        self.old = Ema(transformer, settings.old_decay) if config.has_old_policy else None

    def sampling(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that sample."""
        return nullcontext() if self.old is None else self.old.applied()

    def batch(
        self,
        policy: Policy,
        rollout: Rollout,
        advantages: Advantages,
        conditioning: Conditioning,
        rows: Tensor,
    ) -> ForwardBatch:
        """Samples ``rows`` at their noise levels, and what the old policy says there."""
        batch = forward_batch(
            rollout,
            advantages,
            rows,
            self.steps,
            self._config.rollout.num_trained_steps,
            self._settings,
            self._config.advantage.clip,
            keep_invalid=is_sharded(policy.generator.transformer),
        )
        if self.old is None:
            return batch
        size = self.rollout.batch_size or len(rollout.images)  # has had room in the rollout
        with self.old.applied():
            return replace(batch, old_velocity=_velocities(policy, batch, conditioning, size))

    def after_rollout(self, num_updates: int) -> None:
        """Moves the weights that sample towards those that are trained."""
        if self.old is not None:
            self.old.update(self._settings.decay(num_updates))


def forward_batch(
    rollout: Rollout,
    advantages: Advantages,
    rows: Tensor,
    steps: range,
    num_levels: int,
    algorithm: ForwardAlgorithm,
    clip: float,
    *,
    keep_invalid: bool = False,
) -> ForwardBatch:
    """Samples ``rows`` (int64) of the rollout at ``num_levels`` of the noise levels ``steps`` each,
    without repetition; which ones, and the noise, follow from the sample's own seed.

    Invalid samples are left out, or kept with weight 0 and latents 0.
    """
    valid = advantages.valid
    if not keep_invalid:
        rows = rows[valid[rows]]
    drawn = [_draw(seed, steps, num_levels) for seed in rollout.seeds[rows.cpu()].tolist()]
    empty = torch.empty(2, 0, num_levels, dtype=torch.int64)
    step_index, noise_seed = torch.stack(drawn, 1) if drawn else empty
    step_index = step_index.to(rows.device)
    gate = advantages.kl_gate
    kept = valid.view(-1, *[1] * (rollout.final_latents.dim() - 1))
    return ForwardBatch(
        losses=algorithm.losses,
        clip=clip,
        final_latents=rollout.final_latents.where(kept, 0),
        noise_seed=noise_seed.flatten(),
        step_index=step_index.flatten(),
        advantage=advantages.per_step[rows].gather(1, step_index).flatten(),
        sample_index=rows.repeat_interleave(num_levels),
        weight=valid[rows].float().repeat_interleave(num_levels),
        kl_gate=None if gate is None else gate[rows].repeat_interleave(num_levels),
    )


def _draw(seed: int, steps: range, num_levels: int) -> Tensor:
    """Sorted steps and seeds of their noise ``[2, num_levels]`` int64."""
    rng = torch.Generator().manual_seed(seed + 1)  # not the noise that the sample is made of
    chosen = torch.randperm(len(steps), generator=rng)[:num_levels].sort().values
    return torch.stack([steps.start + chosen, torch.randint(2**62, (num_levels,), generator=rng)])


def forward_process(batch: ForwardBatch, rows: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Latents at noise levels ``sigma`` ``[m]`` of pairs ``rows``, and the velocities that lead
    back to the samples; both ``[m, *L]`` float32."""
    latents = batch.final_latents[batch.sample_index[rows]]
    noise = torch.empty(latents.shape)  # drawn on the CPU, for every device the same
    for row, seed in enumerate(batch.noise_seed[rows.to(batch.noise_seed.device)].tolist()):
        torch.randn(noise[row].shape, generator=torch.Generator().manual_seed(seed), out=noise[row])
    noise = noise.to(latents.device)
    return noised(latents, noise, sigma), noise - latents


@torch.no_grad()
def _velocities(
    policy: Policy, batch: ForwardBatch, conditioning: Conditioning, size: int
) -> Tensor:
    """Velocities ``[M, *L]`` of the model as it is, ``size`` pairs at a time."""
    found = batch.final_latents.new_empty(len(batch.advantage), *batch.final_latents.shape[1:])
    if not len(found):  # no sample of this process is valid
        return found
    with lora_merged(policy.generator.transformer), keeping(policy.generator):
        for rows in torch.arange(len(found), device=found.device).split(size):
            step_index = batch.step_index[rows]
            latents, _ = forward_process(batch, rows, policy.sigmas[step_index])
            condition = conditioning.take(batch.sample_index[rows])
            found[rows] = policy.velocity(latents, step_index, condition)
    return found
