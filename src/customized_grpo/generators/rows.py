"""Rows of a batch that go through the transformer together, by numbers that the host knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
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


def in_passes(
    transformer: nn.Module, keys: Sequence[int], run: Callable[[list[int]], Tensor]
) -> Tensor:
    """Outputs ``[B, ...]`` of ``run``, which gets the rows of one pass: those of equal keys.

    Of a sharded transformer each row is alone: a pass is a meeting, equally many everywhere.
    """
    if isinstance(transformer, FSDPModule):
        groups = [[row] for row in range(len(keys))]
    else:
        known = dict.fromkeys(keys)
        groups = [[i for i, key in enumerate(keys) if key == one] for one in known]
    found = torch.cat([run(rows) for rows in groups])
    order = [row for rows in groups for row in rows]
    return found[torch.tensor(order, device=found.device).argsort()]
