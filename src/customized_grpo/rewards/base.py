"""What a reward model is, and the set of them that scores a batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from customized_grpo.config import RewardConfig
from customized_grpo.devices import is_out_of_memory
from customized_grpo.errors import ConfigError, DataError, RewardError, within
from customized_grpo.types import Example, RewardScores

logger = logging.getLogger("customized_grpo")


class Reward(Protocol):
    """Scores images; higher is better, NaN is 'cannot be scored'."""

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """Scores ``[B]``, on any device, of images ``[B, 3, H, W]`` in [0, 1] for their examples.

        It may be called from another thread than the one that samples, never twice at a time.

        Raises:
            RewardError: if the batch could not be scored; its scores become NaN.
        """
        ...


@runtime_checkable
class ImageEmbedder(Protocol):
    """A reward with an image encoder, whose features serve other measures too."""

    def embed(self, images: Tensor) -> Tensor:
        """Unit features ``[B, D]`` float32 of images ``[B, 3, H, W]`` in [0, 1]."""
        ...


@runtime_checkable
class CopyMeter(Protocol):
    """A reward that also measures, by the same features, how much of the reference is copied."""

    def score_and_gap(self, images: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Scores ``[B]`` as ``score`` gives them, and copy gaps ``[B]``, NaN where not known."""
        ...


@runtime_checkable
class RewardMetrics(Protocol):
    """A reward with numbers of its own for the log: requests, failures, cost."""

    def metrics(self) -> dict[str, float]:
        """Name -> total since the reward was built."""
        ...


@runtime_checkable
class Budgeted(RewardMetrics, Protocol):
    """A reward whose totals count against a limit: a run that is resumed goes on counting."""

    def restore(self, totals: dict[str, float]) -> None:
        """Takes over what ``metrics`` gave before the break."""
        ...


@runtime_checkable
class PartialFailures(Protocol):
    """A reward that can fail on single images, which score NaN, and then says why."""

    def take_errors(self) -> tuple[str, ...]:
        """What went wrong since the last call, few lines for many images."""
        ...


@dataclass(frozen=True, slots=True)
class _BesideImages:
    """An encoder whose features come to the images, wherever it has computed them."""

    encoder: ImageEmbedder

    def embed(self, images: Tensor) -> Tensor:
        """See ImageEmbedder."""
        return self.encoder.embed(images).to(images.device, torch.float32)


class RewardSet:
    """All rewards of a run (or all its evaluators), in the order of the config."""

    def __init__(
        self, configs: Sequence[RewardConfig], device: torch.device, section: str = "rewards"
    ) -> None:
        self.configs = tuple(configs)
        self.names = tuple(config.label for config in configs)
        self._rewards: list[Reward] = []
        for position, config in enumerate(configs):
            logger.info("loading %s.%d: %s", section, position, config.label)
            with within(f"{section}.{position}"):
                self._rewards.append(config.build(device))

    @property
    def objectives(self) -> tuple[str, ...]:
        """identity and prompt first, as the schedule's columns; further ones by first mention."""
        named = dict.fromkeys(config.objective for config in self.configs)
        first = [name for name in ("identity", "prompt") if name in named]
        return (*first, *(name for name in named if name not in first))

    def embedder(self, objective: str) -> ImageEmbedder | None:
        """The first model of an objective that has an image encoder."""
        for config, reward in zip(self.configs, self._rewards, strict=True):
            if config.objective == objective and isinstance(reward, ImageEmbedder):
                return _BesideImages(reward)
        return None

    def metrics(self) -> dict[str, float]:
        """``<reward>/<number>`` of the rewards that have numbers of their own for the log."""
        return {
            f"{name}/{key}": value
            for name, reward in zip(self.names, self._rewards, strict=True)
            if isinstance(reward, RewardMetrics)
            for key, value in reward.metrics().items()
        }

    def restore(self, totals: dict[str, float]) -> None:
        """Gives budgeted rewards back what ``metrics`` gave."""
        for name, reward in zip(self.names, self._rewards, strict=True):
            prefix = f"{name}/"
            own = {k.removeprefix(prefix): v for k, v in totals.items() if k.startswith(prefix)}
            if isinstance(reward, Budgeted) and own:
                reward.restore(own)

    @torch.no_grad()
    def score(self, images: Tensor, examples: Sequence[Example]) -> RewardScores:
        """Scores ``[B, R]``; a reward that fails on the batch gives NaN and an entry in errors.

        The copy gap is that of the first reward that measures one.

        An exception in a reward, which others may have written, costs its scores and not a run of
        days; only a mistake in config or data, and memory that has run out, are raised.
        """
        columns: list[Tensor] = []
        gaps: list[Tensor] = []
        errors: list[str] = []
        unknown = torch.full((len(images),), torch.nan, device=images.device)
        for name, reward in zip(self.names, self._rewards, strict=True):
            try:
                column, gap = _ask(reward, images, examples)
            except (ConfigError, DataError):
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                kind = "" if isinstance(error, RewardError) else f"{type(error).__name__}: "
                errors.append(f"{name}: {kind}{error}")
                column = gap = unknown
            if isinstance(reward, PartialFailures):
                errors.extend(f"{name}: {text}" for text in reward.take_errors())
            columns.append(torch.where(column.isfinite(), column, torch.nan))
            gaps += [gap] if isinstance(reward, CopyMeter) else []
        return RewardScores(
            scores=torch.stack(columns, 1),
            names=self.names,
            copy_gap=gaps[0] if gaps else unknown,
            errors=tuple(errors),
        )


def _ask(reward: Reward, images: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Scores and copy gaps ``[B]``, both as ``_column``; gaps are NaN where none are measured."""
    if isinstance(reward, CopyMeter):
        scores, gap = reward.score_and_gap(images, examples)
    else:
        scores, gap = reward.score(images, examples), torch.full((len(images),), torch.nan)
    return _column(scores, images), _column(gap, images)


def _column(scores: Tensor, images: Tensor) -> Tensor:
    """Scores ``[B]`` of any type, wherever the reward has computed them, beside the images."""
    if scores.shape != images.shape[:1]:
        raise RewardError(
            f"must return one score per image, shape ({len(images)},), got {tuple(scores.shape)}"
        )
    return scores.to(images.device, torch.float32)


def distinct(examples: Sequence[Example]) -> tuple[list[Example], Tensor]:
    """Examples without repeats (by id), and for each given one its place among them ``[B]``."""
    places: dict[str, int] = {}
    unique: list[Example] = []
    for example in examples:
        if example.id not in places:
            places[example.id] = len(unique)
            unique.append(example)
    return unique, torch.tensor([places[example.id] for example in examples])
