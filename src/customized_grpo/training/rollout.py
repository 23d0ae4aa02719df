"""Sampling: the stochastic policy of one denoising step, and trajectories made of its steps.

Rollout and update go through the same ``Policy.transition`` with the same stored float32 latents,
so that on policy the probability ratio is 1 up to the rounding of the model itself.
"""

from __future__ import annotations

import ctypes
import platform
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from customized_grpo.buckets import layout
from customized_grpo.config import RolloutConfig, RunConfig
from customized_grpo.errors import ConfigError
from customized_grpo.generators.base import Conditioning, Generator
from customized_grpo.generators.cpu import lora_merged
from customized_grpo.ops import Dynamics, cps_log_prob, gaussian_log_prob, sde_moments
from customized_grpo.types import Example, Rollout

_VARIANT_STRIDE = 1_000_003


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """The generator as a policy: Gaussian over the next latents at every denoising step."""

    generator: Generator
    sigmas: Tensor
    """``[T + 1]`` float32 on the generator's device."""
    dynamics: Dynamics
    noise_level: float
    autocast: bool
    """Run transformer and decoder under bfloat16 autocast; moments and log-probs stay float32."""

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.sigmas) - 1

    def velocity(self, latents: Tensor, step_index: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity ``[M, *L]`` float32 at steps ``[M]``."""
        kind = latents.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.autocast):
            return self.generator.velocity(latents, self.sigmas[step_index], conditioning).float()

    def transition(
        self, latents: Tensor, step_index: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """Mean ``[M, *L]`` and std ``[M, 1, ...]`` of the latents after steps ``[M]``."""
        return sde_moments(
            self.velocity(latents, step_index, conditioning),
            latents,
            self.sigmas[step_index],
            self.sigmas[step_index + 1],
            dynamics=self.dynamics,
            noise_level=self.noise_level,
            sigma_max=self.sigmas[1],
        )

    def log_prob(self, next_latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Log-probability ``[M]``, mean over dimensions; Flow-CPS has its own definition."""
        if self.dynamics == "cps":
            return cps_log_prob(next_latents, mean)
        return gaussian_log_prob(next_latents, mean, std)

    def euler(self, latents: Tensor, step: int, conditioning: Conditioning) -> Tensor:
        """Latents after one deterministic step."""
        index = torch.full((len(latents),), step, device=latents.device)
        velocity = self.velocity(latents, index, conditioning)
        return latents - (self.sigmas[step] - self.sigmas[step + 1]) * velocity

    def idle_pass(self, conditioning: Conditioning) -> Tensor:
        """A pass that keeps other processes company, where they share a sharded transformer."""
        latents = self.generator.noise(1, torch.Generator())
        first = torch.zeros(1, dtype=torch.int64, device=latents.device)
        return self.velocity(latents, first, conditioning.take(first))

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` float32 in [0, 1]."""
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.autocast):
            return self.generator.decode(latents)


def pick_device(name: str) -> torch.device:
    """``auto``: CUDA where there is one. Call it before the work: it prepares the CPU too.

    Raises:
        ConfigError: if CUDA is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("device: must be available, got 'cuda' and no GPU is visible; use 'auto'")
    if name != "cpu" and available:
        return torch.device("cuda", torch.cuda.current_device())  # threads may have another one
    _keep_freed_memory()
    return torch.device("cpu")


def _keep_freed_memory() -> None:
    """Large tensors come from memory the process has. By default glibc gives each back to the
    system when it is freed, and the next one pays for fresh, zeroed pages: a tenth of the time."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # numbers of the parameters in malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def make_policy(generator: Generator, config: RunConfig, num_steps: int | None = None) -> Policy:
    """The policy of a run; ``num_steps`` overrides the rollout's, for evaluation."""
    steps = num_steps or config.rollout.num_steps
    return Policy(
        generator=generator,
        sigmas=generator.sigmas(steps, config.rollout.shift).to(generator.device),
        dynamics=config.rollout.dynamics,
        noise_level=config.rollout.noise_level,
        autocast=config.mixed_precision == "bf16",
    )


def choose_trained_steps(
    num_groups: int, config: RolloutConfig, generator: torch.Generator
) -> Tensor:
    """Sorted random steps ``[num_groups, K]`` int64 of the window, for each group its own."""
    steps = noisy_steps(config)
    scores = torch.rand(num_groups, len(steps), generator=generator)
    return steps.start + scores.argsort(dim=1)[:, : config.num_trained_steps].sort(dim=1).values


def noisy_steps(config: RolloutConfig) -> range:
    """The window's steps; without one all but the last, whose noise is not worth training."""
    first, end = config.window or (0, config.num_steps - 1)
    return range(first, end)


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The samples that one of several processes computes."""

    num_groups: int
    """Of the whole rollout."""
    rows: Tensor
    """``[b]`` int64, ascending, of the whole rollout's ``[B]``, where groups follow each other."""
    num_passes: int = 0
    """Passes through the transformer to take at least; what the samples do not need is idle."""


def count_passes(config: RolloutConfig, num_groups: int, num_samples: int) -> int:
    """Passes through the transformer that ``collect_rollout`` needs."""
    size = config.batch_size or num_samples
    shared = noisy_steps(config).start if config.shared_noise else 0
    alone = config.num_steps - shared
    return shared * -(-num_groups // size) + alone * -(-num_samples // size)


@torch.no_grad()
def collect_rollout(
    policy: Policy,
    conditioning: Conditioning,
    config: RolloutConfig,
    generator: torch.Generator,
    keep_means: bool = False,
    on_images: Callable[[Tensor, Tensor], None] | None = None,
    share: Share | None = None,
) -> Rollout:
    """Samples ``group_size`` images for each of the prompts in ``conditioning`` ``[P, ...]``.

    ``keep_means`` stores the transitions' means too, which GRPO-Guard needs. ``on_images`` is
    called with the images ``[b, 3, H, W]`` and group ids ``[b]`` of every ``batch_size`` samples
    as soon as they are there, in order, before the next are sampled. With a ``share``, those rows
    of the whole rollout are sampled, and ``conditioning`` is of their groups only, in ascending
    order. Random numbers come from ``generator`` on the CPU in a fixed order, so that neither the
    device nor ``batch_size`` nor the share changes what is drawn. Where the noise of a group is
    shared, the steps before the first noisy one are the same for all its samples and taken once.
    """
    device = policy.sigmas.device
    num_groups = share.num_groups if share else len(next(iter(conditioning.per_sample.values())))
    group_ids = torch.arange(num_groups).repeat_interleave(config.group_size)
    step_index = choose_trained_steps(num_groups, config, generator)[group_ids]
    mine = share.rows if share else torch.arange(len(group_ids))
    groups, place = group_ids[mine].unique(return_inverse=True)
    place = place.to(device)
    size = config.batch_size or len(mine)
    noisy = noisy_steps(config)
    parts = []
    with lora_merged(policy.generator.transformer):
        if config.shared_noise:
            start = policy.generator.noise(num_groups, generator)[groups.to(device)]
            start = _euler_steps(policy, conditioning, start, range(noisy.start), size)
            start, first = start[place], noisy.start
        else:
            start, first = policy.generator.noise(len(group_ids), generator)[mine.to(device)], 0
        seeds = torch.randint(2**62, (len(group_ids),), generator=generator)[mine]
        group_ids, step_index = group_ids[mine], step_index[mine]
        for rows in torch.arange(len(mine)).split(size):
            part = _denoise(
                policy,
                conditioning.take(place[rows.to(device)]),
                start[rows.to(device)],
                step_index[rows],
                _noise(seeds[rows], start[0], len(noisy)),
                first,
                noisy,
                keep_means,
            )
            parts.append(part)
            if on_images is not None:
                on_images(part[-1], group_ids[rows])
        needed = count_passes(config, len(groups), len(mine))
        for _ in range(needed, share.num_passes if share else 0):
            policy.idle_pass(conditioning)
    latents, next_latents, means, log_probs, images = (
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
    )


def _euler_steps(
    policy: Policy,
    conditioning: Conditioning,
    latents: Tensor,
    steps: range,
    size: int,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Latents ``[B, *L]`` after deterministic steps, ``size`` samples at a time."""
    parts = []
    for rows in torch.arange(len(latents), device=latents.device).split(size):
        part, condition = latents[rows], conditioning.take(rows)
        for step in steps:
            if on_step is not None:
                on_step()
            part = policy.euler(part, step, condition)
        parts.append(part)
    return torch.cat(parts)


def _noise(seeds: Tensor, like: Tensor, num_steps: int) -> Tensor:
    """``[num_steps, B, *L]`` on the device, each sample's from its own seed on the CPU."""
    drawn = torch.empty(num_steps, len(seeds), *like.shape)
    for row, seed in enumerate(seeds.tolist()):
        random = torch.Generator().manual_seed(seed)
        for step in range(num_steps):
            torch.randn(like.shape, generator=random, out=drawn[step, row])
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
    return before, after, means, log_probs, policy.decode(latents)


@torch.no_grad()
def sample_images(
    policy: Policy,
    conditioning: Conditioning,
    noise: Tensor,
    batch_size: int,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Deterministic (Euler) images ``[B, 3, H, W]`` from noise ``[B, *L]``.

    ``on_step`` is called before every denoising step of a batch; what it raises ends the sampling.
    """
    steps = range(policy.num_steps)
    with lora_merged(policy.generator.transformer):
        latents = _euler_steps(policy, conditioning, noise, steps, batch_size, on_step)
    return torch.cat([policy.decode(part) for part in latents.split(batch_size)])


class FixedSampler:
    """Deterministic (Euler) images of the same examples from the same noise whenever it is called.

    ``variant`` numbers the noises: other variants are other pictures for the same prompts.
    ``encode`` takes the place of the generator's own, such as a cached one, and ``noise``
    ``[len(examples), *L]`` that of the config's.
    """

    def __init__(
        self,
        generator: Generator,
        config: RunConfig,
        examples: Sequence[Example],
        variant: int = 0,
        encode: Callable[[Sequence[Example]], Conditioning] | None = None,
        noise: Tensor | None = None,
    ) -> None:
        self.examples = tuple(examples)
        self._policy = make_policy(generator, config, config.evaluation.num_steps)
        if noise is None:
            seed = config.evaluation.seed + _VARIANT_STRIDE * variant
            noise = generator.noise(len(examples), torch.Generator().manual_seed(seed))
        self._noise = noise
        self._batch_size = config.evaluation.batch_size
        rows: dict[object, list[int]] = defaultdict(list)
        for row, example in enumerate(examples):
            rows[layout(r.shape[1:] for r in example.references)].append(row)
        encode = encode or generator.encode
        self._parts = [(p, encode([examples[i] for i in p])) for p in rows.values()]

    def __call__(self, on_step: Callable[[], None] | None = None) -> Tensor:
        """Images ``[len(examples), 3, H, W]`` of the generator as it is now; ``on_step``: see
        ``sample_images``."""
        order = torch.tensor([row for rows, _ in self._parts for row in rows])
        images = [
            sample_images(self._policy, conditioning, self._noise[rows], self._batch_size, on_step)
            for rows, conditioning in self._parts
        ]
        return torch.cat(images)[order.argsort()]
