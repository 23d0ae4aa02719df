"""Rows of a batch that go through the transformer together, by numbers that the host knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


class Known:
    """A few numbers on the host; their tensor is the same over all steps of a batch and waited for
    once."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Tensor, list[Any]]] = {}

    def on_host(self, given: Mapping[str, Tensor], name: str) -> list[Any]:
        """``given[name]`` as a list."""
        known, numbers = self._known.get(name, (None, []))
        if known is not given[name]:
            numbers = given[name].tolist()
            self._known[name] = given[name], numbers
        return numbers


def rows_together(transformer: nn.Module, keys: Sequence[int]) -> list[list[int]]:
    """Rows of equal keys, whose pass is one.

    Of a sharded transformer each row is alone: a pass is a meeting, equally many everywhere.
    """
    if isinstance(transformer, FSDPModule):
        return [[row] for row in range(len(keys))]
    return [[i for i, key in enumerate(keys) if key == known] for known in dict.fromkeys(keys)]
