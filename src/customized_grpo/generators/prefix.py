"""Keys and values of what stands before the target and is the same at every step: the prefix."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import torch
from torch import Tensor

Layers: TypeAlias = list[tuple[Tensor, Tensor]]
"""Keys and values ``[1, n, heads, head_dim]`` of every block."""


class Prefixes:
    """Prefixes of the examples in use, each computed once while the weights do not change.

    Where gradients are enabled, a prefix collects its gradient over any number of backward passes
    and hands it on to the weights when its example is no longer in use: by the chain rule what they
    would have had.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[Any, ...], Layers] = {}
        self._kept: dict[tuple[Any, ...], Layers] = {}

    def get(self, example: int, variant: tuple[Any, ...], make: Callable[[], Layers]) -> Layers:
        """The prefix of an example, by ``make`` where it is not kept; ``variant`` is what else it
        depends on."""
        key = example, variant, torch.is_grad_enabled()
        if key not in self._kept:
            made = make()
            if torch.is_grad_enabled():
                self._graphs[key] = made
                made = [(_leaf(keys), _leaf(values)) for keys, values in made]
            self._kept[key] = made
        return self._kept[key]

    def keep_only(self, examples: Collection[int]) -> None:
        """Drops the prefixes of others. Call it when the backward passes through them are over."""
        for key in [key for key in self._kept if key[0] not in examples]:
            leaves, graph = self._kept.pop(key), self._graphs.pop(key, [])
            pairs = [
                (tensor, leaf.grad)
                for layer, kept in zip(graph, leaves, strict=bool(graph))
                for tensor, leaf in zip(layer, kept, strict=True)
                if leaf.grad is not None
            ]
            if pairs:
                tensors, gradients = zip(*pairs, strict=True)
                torch.autograd.backward(tensors, gradients)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)
