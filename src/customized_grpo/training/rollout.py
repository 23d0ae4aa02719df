"""A rollout: stochastic trajectories of whole groups, and the transitions that will be trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from customized_grpo.config import RolloutConfig
from customized_grpo.generators.base import Conditioning, keeping
from customized_grpo.generators.cpu import lora_merged
from customized_grpo.training.policy import Policy
from customized_grpo.training.sampling import euler_steps
from customized_grpo.types import Rollout


def noisy_steps(config: RolloutConfig) -> range:
    """The window's steps; without one all but the last, whose noise is not worth training; none of
    an ODE."""
    if config.dynamics == "ode":
        return range(0)
    first, end = config.window or (0, config.num_steps - 1)
    return range(first, end)


def choose_trained_steps(num_groups: int, config: RolloutConfig, rng: torch.Generator) -> Tensor:
    """Sorted random steps ``[num_groups, K]`` int64 of the window, for each group its own."""
    steps = noisy_steps(config)
    scores = torch.rand(num_groups, len(steps), generator=rng)
    return steps.start + scores.argsort(dim=1)[:, : config.num_trained_steps].sort(dim=1).values


def one_step_rollouts(config: RolloutConfig, group_size: int) -> dict[int, RolloutConfig]:
    """For each of the noisy steps a rollout whose groups share all but the noise of that step."""
    return {
        step: replace(
            config,
            window=(step, step + 1),
            num_trained_steps=1,
            group_size=group_size,
            shared_noise=True,
        )
        for step in noisy_steps(config)
    }


@torch.no_grad()
def collect_rollout(
    policy: Policy,
    conditioning: Conditioning,
    config: RolloutConfig,
    rng: torch.Generator,
    keep_means: bool = False,
    on_images: Callable[[Tensor, Tensor], None] | None = None,
    rows: Tensor | None = None,
    num_groups: int | None = None,
) -> Rollout:
    """Samples ``group_size`` images for each of the prompts in ``conditioning`` ``[P, ...]``.

    Random numbers come from ``rng`` on the CPU in a fixed order, and each sample's noise from a
    seed of its own: neither the device nor ``batch_size`` nor ``rows`` changes what is drawn. Where
    the noise of a group is shared, the steps before the first noisy one are the same for all its
    samples and taken once.

    Args:
        policy: samples.
        conditioning: of the groups that ``rows`` belong to, in ascending order.
        config: of the rollout.
        rng: on the CPU.
        keep_means: store the transitions' means too, which GRPO-Guard and Flow-DPPO need.
        on_images: is called with images ``[b, 3, H, W]`` and group ids ``[b]`` of every
            ``batch_size`` samples as soon as they are there, in order.
        rows: ``[b]`` int64, ascending: the part of the rollout's samples ``[B]`` (group after
            group) that this process computes; None: all.
        num_groups: of the whole rollout; None: as many as ``conditioning`` has.
    """
    device = policy.sigmas.device
    num_groups = num_groups or len(next(iter(conditioning.per_sample.values())))
    group_ids = torch.arange(num_groups).repeat_interleave(config.group_size)
    step_index = choose_trained_steps(num_groups, config, rng)[group_ids]
    mine = torch.arange(len(group_ids)) if rows is None else rows
    groups, place = group_ids[mine].unique(return_inverse=True)
    place = place.to(device)
    size = config.batch_size or len(mine)
    noisy = noisy_steps(config)
    parts = []
    with lora_merged(policy.generator.transformer), keeping(policy.generator):
        if config.shared_noise:
            start = policy.generator.noise(num_groups, rng)[groups.to(device)]
            start = euler_steps(policy, conditioning, start, range(noisy.start), size)
            start, first = start[place], noisy.start
        else:
            start, first = policy.generator.noise(len(group_ids), rng)[mine.to(device)], 0
        seeds = torch.randint(2**62, (len(group_ids),), generator=rng)[mine]
        group_ids, step_index = group_ids[mine], step_index[mine]
        for batch in torch.arange(len(mine)).split(size):
            part = _denoise(
                policy,
                conditioning.take(place[batch.to(device)]),
                start[batch.to(device)],
                step_index[batch],
                _noise(seeds[batch], start[0], len(noisy)),
                first,
                noisy,
                keep_means,
            )
            parts.append(part)
            if on_images is not None:
                on_images(part[-1], group_ids[batch])
    latents, next_latents, means, log_probs, final_latents, images = (
        torch.cat(part) for part in zip(*parts, strict=True)
    )
    return Rollout(
        latents=latents,
        next_latents=next_latents,
        means=means if keep_means else None,
        log_probs=log_probs,
        step_index=step_index.to(device),
        sigmas=policy.sigmas,
        images=images,
        group_ids=group_ids.to(device),
        final_latents=final_latents,
        seeds=seeds,
    )


def _noise(seeds: Tensor, like: Tensor, num_steps: int) -> Tensor:
    """``[num_steps, B, *L]`` on the device, each sample's from its own seed on the CPU."""
    drawn = torch.empty(num_steps, len(seeds), *like.shape)
    for row, seed in enumerate(seeds.tolist()):
        rng = torch.Generator().manual_seed(seed)
        for step in range(num_steps):
            torch.randn(like.shape, generator=rng, out=drawn[step, row])
    return drawn.to(like.device)


def _denoise(
    policy: Policy,
    conditioning: Conditioning,
    latents: Tensor,
    step_index: Tensor,
    noise: Tensor,
    first: int,
    noisy: range,
    keep_means: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Trajectories ``[B]`` from step ``first`` on; keeps the trained transitions only.

    Everything from the host is moved to the device before the first step: none waits for it.
    """
    device = latents.device
    before = latents.new_empty(*step_index.shape, *latents.shape[1:])
    after = torch.empty_like(before)
    means = torch.empty_like(before) if keep_means else before[:0]
    log_probs = latents.new_empty(step_index.shape)
    trained = [(step_index == step).nonzero().to(device).unbind(1) for step in noisy]
    for step in range(first, policy.num_steps):
        if step not in noisy:
            latents = policy.euler(latents, step, conditioning)
            continue
        index = torch.full((len(latents),), step, device=device)
        mean, std = policy.transition(latents, index, conditioning)
        number = step - noisy.start
        sampled = torch.addcmul(mean, std, noise[number])
        rows, columns = trained[number]
        before[rows, columns] = latents[rows]
        after[rows, columns] = sampled[rows]
        if keep_means:
            means[rows, columns] = mean[rows]
        log_probs[rows, columns] = policy.log_prob(sampled, mean, std)[rows]
        latents = sampled
    return before, after, means, log_probs, latents, policy.decode(latents)
