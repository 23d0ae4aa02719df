"""Deterministic pictures by the generator as it is now: for sample grids, validation, evaluation,
and whoever draws with what a run has trained."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from customized_grpo.buckets import layout
from customized_grpo.config import RunConfig
from customized_grpo.errors import ConfigError, within
from customized_grpo.generators.base import Conditioning, Generator, Guidable, Sizable, keeping
from customized_grpo.generators.cpu import lora_merged
from customized_grpo.training.policy import Policy, make_policy
from customized_grpo.types import Example

_VARIANT_STRIDE = 1_000_003


@torch.no_grad()
def euler_steps(
    policy: Policy,
    conditioning: Conditioning,
    latents: Tensor,
    steps: range,
    batch_size: int,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Latents ``[B, *L]`` after deterministic steps, ``batch_size`` samples at a time."""
    parts = []
    for rows in torch.arange(len(latents), device=latents.device).split(batch_size):
        part, condition = latents[rows], conditioning.take(rows)
        for step in steps:
            if on_step is not None:
                on_step()
            part = policy.euler(part, step, condition)
        parts.append(part)
    return torch.cat(parts)


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
    with lora_merged(policy.generator.transformer), keeping(policy.generator):
        latents = euler_steps(policy, conditioning, noise, steps, batch_size, on_step)
    return torch.cat([policy.decode(part) for part in latents.split(batch_size)])


def as_evaluated(generator: Generator, config: RunConfig) -> Generator:
    """The generator with the guidance and the size of pictures that are not trained on.

    Raises:
        ConfigError: naming the field of ``evaluation``, if it cannot have them.
    """
    own = config.evaluation
    with within("evaluation"):
        if own.guidance_scale is not None:
            if not isinstance(generator, Guidable):
                raise _lacking("guidance_scale", own.guidance_scale, "guided", config)
            generator = generator.guided(own.guidance_scale)
        if own.height is not None or own.width is not None:
            if not isinstance(generator, Sizable):
                field = "width" if own.height is None else "height"
                raise _lacking(field, getattr(own, field), "sized", config)
            generator = generator.sized(own.height, own.width)
    return generator


def _lacking(field: str, value: object, method: str, config: RunConfig) -> ConfigError:
    return ConfigError(
        f"{field} must be null for generator {config.generator.type}, got {value}; it has no "
        f"method {method}"
    )


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
        generator = as_evaluated(generator, config)
        self._policy = make_policy(generator, config, config.evaluation.num_steps)
        if noise is None:
            seed = config.evaluation.seed + _VARIANT_STRIDE * variant
            noise = generator.noise(len(examples), torch.Generator().manual_seed(seed))
        self._noise = noise
        self._batch_size = config.evaluation.batch_size
        # Samples of a batch share their position ids, so references must be alike in layout.
        rows: dict[object, list[int]] = defaultdict(list)
        for row, example in enumerate(examples):
            rows[layout(r.shape[1:] for r in example.references)].append(row)
        encode = encode or generator.encode
        self._parts = [(p, encode([examples[i] for i in p])) for p in rows.values()]

    @property
    def num_calls(self) -> int:
        """How often ``on_step`` is called."""
        sizes = (len(rows) for rows, _ in self._parts)
        return sum(-(-size // self._batch_size) for size in sizes) * self._policy.num_steps

    def __call__(self, on_step: Callable[[], None] | None = None) -> Tensor:
        """Images ``[len(examples), 3, H, W]`` of the generator as it is now; ``on_step``: see
        ``sample_images``."""
        order = torch.tensor([row for rows, _ in self._parts for row in rows])
        images = [
            sample_images(self._policy, conditioning, self._noise[rows], self._batch_size, on_step)
            for rows, conditioning in self._parts
        ]
        return torch.cat(images)[order.argsort()]
