"""LoRA as part of the weights for as long as they do not change.

An adapter costs few multiplications and, on a CPU, much time: its passes read and write every
token of a layer twice more. Between two optimizer steps ``W + s B A`` can be had once instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_PASSES = 350  # what an adapter's passes over its output cost, in multiplications per element

# Those merged at the moment: ``unmerged`` needs them, and peft knows nothing of them.
_merged: WeakKeyDictionary[nn.Module, list[_Merged]] = WeakKeyDictionary()


@contextmanager
def lora_merged(transformer: nn.Module) -> Iterator[None]:
    """Adapters as part of the weights they adapt: ``x (W + s B A)`` for ``x W + s (x A) B``.

    Where gradients are enabled, the sum collects its gradient inside, over any number of backward
    passes, and hands it on to A and B at the end: by the chain rule what they would have had.

    Adapters stay apart where merging is slower (on a GPU always, where it takes memory, too), where
    the sum would lose them (weights in bfloat16, quantised), and where a block is compiled, for
    that knows its parameters by name.
    """
    compiled = any(m._compiled_call_impl is not None for m in transformer.modules())
    layers = [] if compiled else [m for m in transformer.modules() if _is_merged_faster(m)]
    merged: list[_Merged] = []
    _merged[transformer] = merged
    try:
        for layer in layers:
            merged.append(_Merged(layer))
        yield
    finally:
        del _merged[transformer]
        for layer in merged:
            layer.restore()
    for layer in merged:
        layer.pass_gradient_on()


@contextmanager
def unmerged(transformer: nn.Module) -> Iterator[None]:
    """The base weights bit by bit, also within ``lora_merged``: nothing is subtracted."""
    merged = _merged.get(transformer, [])
    for layer in merged:
        layer.restore()
    try:
        yield
    finally:
        for layer in merged:
            layer.merge()


def _is_merged_faster(module: Any) -> bool:
    from peft.tuners.lora import Linear

    if type(module) is not Linear or module.merged or module.disable_adapters:
        return False
    base, (name, *others) = module.base_layer, module.active_adapters
    if type(base) is not nn.Linear or others or base.weight.dtype.itemsize < 4:
        return False
    if isinstance(base.weight, DTensor):  # sharded
        return False
    if base.weight.device.type != "cpu":
        return False
    if not torch.is_grad_enabled():
        return True
    # The sum's own gradient is as wide as the layer; the adapter's would only be as wide as r.
    share = 1 + base.in_features / base.out_features
    return base.in_features <= 3 * module.r[name] * share + _PASSES


class _Merged:
    """One layer whose base holds the sum."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._weight = layer, layer.base_layer.weight
        (name,) = layer.active_adapters
        change = layer.lora_B[name].weight @ layer.lora_A[name].weight
        self._graph: Tensor = self._weight + change * layer.scaling[name]
        # A leaf of its own: every backward pass adds to its gradient, and none walks on to A and B.
        self._sum = nn.Parameter(self._graph.detach(), requires_grad=self._graph.requires_grad)
        self.merge()

    def merge(self) -> None:
        self._layer.base_layer.weight = self._sum
        self._layer.merged_adapters[:] = self._layer.active_adapters  # so that peft adds none

    def restore(self) -> None:
        self._layer.base_layer.weight = self._weight
        self._layer.merged_adapters.clear()

    def pass_gradient_on(self) -> None:
        if self._sum.grad is not None:
            self._graph.backward(self._sum.grad)
