"""What a reward model is, and the set of them that scores a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

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


class GroupReward(Protocol):
    """Scores the pictures of a group relative to each other, such as by their rank; what
    ``RewardConfig.is_groupwise`` builds."""

    def score_groups(
        self, groups: Sequence[Tensor], examples: Sequence[Example]
    ) -> Sequence[Tensor]:
        """Scores ``[G]`` of each group of images ``[G, 3, H, W]`` in [0, 1], made for one example.

        A group has two images at least, and may have fewer than ``rollout.group_size``: those that
        are not finite are left out. Scores of different groups are never compared.

        Raises:
            RewardError: if the groups could not be scored; their scores become NaN.
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
    """A reward whose totals are the run's, maybe up to a limit: one that is resumed goes on
    counting."""

    def restore(self, totals: dict[str, float]) -> None:
        """Takes over what ``metrics`` gave before the break."""
        ...


@runtime_checkable
class PartialFailures(Protocol):
    """A reward that can fail on single images, which score NaN, and then says why."""

    def take_errors(self) -> tuple[str, ...]:
        """What went wrong since the last call, few lines for many images."""
        ...


@runtime_checkable
class People(Protocol):
    """A `GroupReward` that asks people. ``score_groups`` asks, and gives NaN for a group until it
    has been answered: it is called again when all are, or nobody is worth waiting for."""

    def begin(self, run: Path, rank: int) -> None:
        """A run begins or goes on, in its folder; ``rank`` numbers its processes."""
        ...

    def progress(self) -> tuple[int, int]:
        """How many groups have been answered, and about how many was asked."""
        ...

    def is_patient(self) -> bool:
        """Whether more answers are worth waiting for."""
        ...

    def dismiss(self) -> None:
        """Nobody waits for what was asked any more."""
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
        self._rewards: list[Any] = []
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

    @property
    def has_groupwise(self) -> bool:
        """Whether one of them scores whole groups."""
        return any(config.is_groupwise for config in self.configs)

    @property
    def people(self) -> list[People]:
        """Those that ask people."""
        return [reward for reward in self._rewards if isinstance(reward, People)]

    def only_people(self) -> RewardSet:
        """The same without the models."""
        part, pairs = copy(self), zip(self.configs, self._rewards, strict=True)
        part.configs = tuple(config for config, reward in pairs if isinstance(reward, People))
        part.names = tuple(config.label for config in part.configs)
        part._rewards = list(self.people)
        return part

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
    def score(
        self, images: Tensor, examples: Sequence[Example], groups: Tensor | None = None
    ) -> RewardScores:
        """Scores ``[B, R]``; a reward that fails on the batch gives NaN and an entry in errors.

        The copy gap is that of the first reward that measures one.

        An exception in a reward, which others may have written, costs its scores and not a run of
        days; only a mistake in config or data, and memory that has run out, are raised.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            examples: one for each image.
            groups: ``[B]`` int64, ids; the groups have to be whole. None: the images are in none,
                and the rewards that score groups are left out.
        """
        columns: list[Tensor] = []
        gaps: list[Tensor] = []
        errors: list[str] = []
        unknown = torch.full((len(images),), torch.nan, device=images.device)
        asked = [
            (config, reward)
            for config, reward in zip(self.configs, self._rewards, strict=True)
            if groups is not None or not config.is_groupwise
        ]
        for config, reward in asked:
            name = config.label
            try:
                if config.is_groupwise and groups is not None:
                    column, gap = _ask_groups(reward, images, examples, groups), unknown
                else:
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
            scores=torch.stack(columns, 1) if columns else unknown.new_empty(len(images), 0),
            names=tuple(config.label for config, _ in asked),
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


def _ask_groups(
    reward: GroupReward, images: Tensor, examples: Sequence[Example], groups: Tensor
) -> Tensor:
    """Scores ``[B]`` of a reward that sees the whole groups; NaN where there is nothing to compare:
    for images that are not finite, and in a group with fewer than two that are."""
    groups = groups.to(images.device)
    is_finite = images.flatten(1).isfinite().all(1)
    members = [(is_finite & (groups == group)).nonzero()[:, 0] for group in groups.unique()]
    members = [rows for rows in members if len(rows) > 1]
    column = torch.full((len(images),), torch.nan, device=images.device)
    if not members:
        return column
    parts = [images[rows] for rows in members]
    scored = reward.score_groups(parts, [examples[rows[0]] for rows in members])
    for rows, part, scores in zip(members, parts, scored, strict=True):
        column[rows] = _column(scores, part)
    return column


def _column(scores: Tensor, images: Tensor) -> Tensor:
    """Scores ``[B]`` of any type, wherever the reward has computed them, beside the images."""
    if scores.shape != images.shape[:1]:
        raise RewardError(
            f"must return one score per image, shape ({len(images)},), got {tuple(scores.shape)}"
        )
    return scores.to(images.device, torch.float32)


def score_finite(
    score: Callable[[Tensor, Sequence[Example]], Tensor],
    images: Tensor,
    examples: Sequence[Example],
) -> Tensor:
    """What ``score`` gives to the images that are finite; NaN for the others."""
    rows = images.flatten(1).isfinite().all(1).nonzero()[:, 0]
    column = torch.full((len(images),), torch.nan, device=images.device)
    if len(rows):
        column[rows] = score(images[rows], [examples[i] for i in rows.tolist()])
    return column


def distinct(examples: Sequence[Example]) -> tuple[list[Example], Tensor]:
    """Examples without repeats (by id), and for each given one its place among them ``[B]``."""
    places: dict[str, int] = {}
    unique: list[Example] = []
    for example in examples:
        if example.id not in places:
            places[example.id] = len(unique)
            unique.append(example)
    return unique, torch.tensor([places[example.id] for example in examples])
