"""Counts what a computation does by running it on tensors without numbers.

PyTorch runs the very code that will be run, on fake tensors that know their shape and type only:
nothing is computed, no weights are needed, and no formula can differ from the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """What one call did."""

    flops: float  # in matrix products, convolutions and attention: 2 per multiply-add
    kept: float
    """Bytes it allocated that outlive it: its result, and what a backward pass will need."""
    peak: float  # largest number of bytes it had allocated at one time


def count(function: Callable[[], object]) -> Count:
    """Runs ``function`` once, on fake tensors or real ones, and counts.

    Attention counts as its useful work, whichever kernel does it: forward two products of queries
    and keys, backward four.
    """
    memory = _Memory()
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as flops, memory:
        result = function()
        kept = memory.now
    del result
    return Count(flops=flops.get_total_flops(), kept=kept, peak=memory.peak)


def _forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    return 2 * sdpa_flop_count(query, key, value)


_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    # torch's own count of these adds the scores that the kernels compute a second time.
    _aten._scaled_dot_product_flash_attention_backward: _backward,
    _aten._scaled_dot_product_efficient_attention_backward: _backward,
    _aten._scaled_dot_product_cudnn_attention_backward: _backward,
}


class _Memory(TorchDispatchMode):
    """Follows every storage from the operator that makes it to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = _storages((args, kwargs))
        for key, storage in _storages(result).items():
            if key not in known:  # else it is a view, or was written in place
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, size: int) -> None:
        self.now -= size


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}


on_skeletons = FakeTensorMode()  # one for all: fake tensors of two modes do not go together
"""Inside, new tensors are fake and lie on the CPU, beside the models made by ``make_fake``."""


@contextmanager
def on_meta(dtype: torch.dtype) -> Iterator[None]:
    """Inside, a model can be built without memory for its weights, which are of ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def make_fake(module: nn.Module) -> None:
    """Replaces the tensors of a module on the meta device by fake ones, in place.

    It cannot be converted or given adapters afterwards; before, on the meta device, it can.
    """
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = nn.Parameter(_fake(parameter), requires_grad=parameter.requires_grad)
                part._parameters[name] = made.setdefault(id(parameter), fake)
        for tensors in (part._buffers, vars(part)):  # Qwen-Image keeps tensors as attributes
            for name, value in tensors.items():
                if isinstance(value, Tensor):
                    tensors[name] = _fake(value)


def _fake(tensor: Tensor) -> Tensor:
    with on_skeletons:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
