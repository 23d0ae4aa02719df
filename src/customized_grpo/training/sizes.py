"""Which shape the pictures of a rollout have, and what makes pictures of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from customized_grpo.buckets import nearest_ratio, sides
from customized_grpo.config import GeneratorConfig, RunConfig
from customized_grpo.errors import ConfigError
from customized_grpo.generators.base import Conditioning, Generator, Sizable
from customized_grpo.generators.cache import CachedEncoder
from customized_grpo.training.policy import Policy, make_policy
from customized_grpo.types import Example

_SEED_STRIDE = 1_000_003


@dataclass(frozen=True, kw_only=True, slots=True)
class Sized:
    """What makes pictures of one size."""

    policy: Policy
    encode: Callable[[Sequence[Example]], Conditioning]


class Sizes:
    """The policy of every rollout: of a shape by the rollout's number, which all processes and a
    resumed run know.

    ``come_again``: whether examples do, so that what they were encoded to is worth keeping.
    """

    def __init__(self, generator: Generator, config: RunConfig, *, come_again: bool) -> None:
        self._generator, self._config = generator, config
        self._cache = CachedEncoder(generator, config.generator, config.cache)
        self._come_again = come_again
        encode = self._cache if come_again else generator.encode
        self.own = Sized(policy=make_policy(generator, config), encode=encode)
        """Of the generator's own size."""
        self._others: dict[int, Sized] = {}

    def of(self, rollout: int, prompts: Sequence[Example]) -> Sized:
        """For rollout number ``rollout``, of examples of one layout."""
        shapes = self._config.rollout.aspect_ratios
        if not shapes:
            return self.own
        cycle, place = divmod(rollout, len(shapes))
        rng = torch.Generator().manual_seed(self._config.seed * _SEED_STRIDE + cycle)
        shape = shapes[int(torch.randperm(len(shapes), generator=rng)[place])]
        _, *shown = prompts[0].references[0].shape
        height, width = shown if shape == "reference" else sides(shape)
        ratio = nearest_ratio(height, width)
        if ratio not in self._others:
            self._others[ratio] = self._make(height, width)
        return self._others[ratio]

    def _make(self, height: int, width: int) -> Sized:
        generator = shaped(self._generator, height, width, self._config)
        cache = self._cache.of(generator, _plug(generator, self._config))
        encode = cache if self._come_again else generator.encode
        return Sized(policy=make_policy(generator, self._config), encode=encode)

    def config_of(self, policy: Policy) -> RunConfig:
        """The config of a run all of whose rollouts are of the size of ``policy``."""
        config, generator = self._config, policy.generator
        if policy is self.own.policy or not isinstance(generator, Sizable):
            return config
        rollout = replace(config.rollout, aspect_ratios=())
        return replace(config, generator=_plug(generator, config), rollout=rollout)


def _plug(generator: Sizable, config: RunConfig) -> GeneratorConfig:
    plug: Any = config.generator
    return replace(plug, height=generator.height, width=generator.width)


def shaped(generator: Generator, height: int, width: int, config: RunConfig) -> Sizable:
    """The generator with pictures of a shape; see ``Sizable.shaped``.

    Raises:
        ConfigError: naming ``rollout.aspect_ratios``, if it has no such pictures.
    """
    if not isinstance(generator, Sizable):
        raise ConfigError(
            f"rollout.aspect_ratios must be empty for generator {config.generator.type}; it has no "
            "method shaped"
        )
    try:
        return generator.shaped(height, width)
    except ConfigError as error:
        raise ConfigError(f"rollout.aspect_ratios: {error}") from error


def check_sizes(generator: Generator, config: RunConfig) -> None:
    """Makes every shape once, so that a mistake shows before a run begins.

    Raises:
        ConfigError: see ``shaped``.
    """
    for shape in config.rollout.aspect_ratios:
        height, width = (2, 3) if shape == "reference" else sides(shape)
        shaped(generator, height, width, config)
