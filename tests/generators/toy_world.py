"""Plugs by import path: blocky pictures as references, and a reward anyone can compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from customized_grpo.config import DataConfig, RewardConfig
from customized_grpo.types import Example

_PROMPTS = ("a cat on the beach", "a dog in the snow", "a cup", "a fox at night, in a red hat")


def blocks(count: int = 1, prompt: str = _PROMPTS[0], seed: int = 0) -> Example:
    """An example with ``count`` references of coloured blocks, 96 px and exact in 8 bits."""
    random = torch.Generator().manual_seed(seed)
    small = [torch.rand(3, 8, 8, generator=random) for _ in range(count)]
    references = [r.repeat_interleave(12, 1).repeat_interleave(12, 2) for r in small]
    return Example(
        id=f"{prompt}-{count}-{seed}",
        prompt=prompt,
        references=tuple((r * 255).round() / 255 for r in references),
        subject="cat",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyData(DataConfig):
    """Four prompts."""

    type: Literal["toy"] = "toy"  # pyright: ignore[reportIncompatibleVariableOverride]
    num_references: int = 1
    """How many each example has."""

    def build(self, seed: int) -> ToySource:
        return ToySource([blocks(self.num_references, p, i) for i, p in enumerate(_PROMPTS)])


class ToySource:
    def __init__(self, examples: list[Example]) -> None:
        self._examples = examples

    def training(self, rollout: int, count: int) -> list[Example]:
        first = rollout * count
        return [self._examples[i % len(self._examples)] for i in range(first, first + count)]

    def listed(self) -> Sequence[Example]:
        return self._examples

    def held_out(self, count: int) -> list[Example]:
        return self._examples[:count]

    validation = held_out


@dataclass(frozen=True, kw_only=True, slots=True)
class Redness(RewardConfig):
    """How much redder than green and blue."""

    type: Literal["redness"] = "redness"  # pyright: ignore[reportIncompatibleVariableOverride]

    def build(self, device: torch.device) -> Redness:
        return self

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        red, green, blue = images.mean((2, 3)).unbind(1)
        return red - (green + blue) / 2
