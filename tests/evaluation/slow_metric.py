"""A metric that takes its time, so that a test can interrupt it; found by import path."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from customized_grpo.config import RewardConfig
from customized_grpo.types import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowConfig(RewardConfig):
    """Mean brightness."""

    type: Literal["slow"] = "slow"  # pyright: ignore
    seconds: float = 0.1

    def build(self, device: torch.device) -> Slow:
        return Slow(self.seconds)


class Slow:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        time.sleep(self._seconds)
        return images.mean((1, 2, 3))
