"""Models that lie on the host and come to the device only while they work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Offloaded:
    """Frozen modules whose weights stay on the host, in memory that the device reads directly.

    What comes to the device is a copy, and is dropped after the work: nothing is copied back.
    Pinned memory takes up to a third more than the weights, for torch rounds blocks up; where the
    host gives none, weights stay where they are.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        self._device = device
        self._tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        if device.type != "cpu":
            for tensor in self._tensors:
                tensor.data = _pinned(tensor.data)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, the modules are on the device."""
        host = [tensor.data for tensor in self._tensors]
        try:
            for tensor in self._tensors:
                tensor.data = tensor.data.to(self._device, non_blocking=True)
            yield
        finally:
            for tensor, kept in zip(self._tensors, host, strict=True):
                tensor.data = kept


def _pinned(tensor: Tensor) -> Tensor:
    try:
        return tensor.pin_memory()
    except RuntimeError:  # the host's limit of locked memory
        return tensor
