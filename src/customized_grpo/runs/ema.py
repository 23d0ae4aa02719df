"""The moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Ema:
    """Exponential moving average of the trained parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._decay = decay
        self.average = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self, decay: float | None = None) -> None:
        """Moves the average towards the current parameters, by ``1 - decay``; None: as always."""
        weight = 1 - (self._decay if decay is None else decay)
        for average, parameter in zip(self.average, self._parameters, strict=True):
            average.lerp_(parameter, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the context the module holds the average, and ``average`` the parameters."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """In place, for the optimizer and FSDP know the tensors; one at a time in memory."""
        for parameter, average in zip(self._parameters, self.average, strict=True):
            current = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(current)
