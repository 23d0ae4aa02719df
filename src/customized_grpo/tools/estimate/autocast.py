"""Autocast by CUDA's rules on a machine that has no CUDA.

On a CPU autocast leaves norms and upsampling in bfloat16. On CUDA they are computed in float32, and
so are their results: half as much again of what a pass through a transformer or a VAE keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils._pytree import tree_map

# What the counted models call of AT_FORALL_FP32, its variant with a dtype, and norm, in
# ATen/autocast_mode.h of torch 2.13.
_IN_FLOAT32 = (
    "layer_norm", "rms_norm", "group_norm", "norm.ScalarOpt_dim", "linalg_vector_norm",
    "upsample_nearest2d", "upsample_nearest2d.vec", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact2d.vec", "pow.Tensor_Scalar", "rsqrt", "exp", "softmax.int", "sum",
    "sum.dim_IntList",
)  # fmt: skip
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


@contextmanager
def cuda_autocast(*, enabled: bool) -> Iterator[None]:
    """Inside, if ``enabled``, bfloat16 autocast on the CPU has the types that CUDA's has."""
    if not enabled:
        yield
        return
    rules = Library("aten", "IMPL")
    try:
        for name in _IN_FLOAT32:
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            rules.impl(name, partial(_in_float32, operator), "AutocastCPU")
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            yield
    finally:
        rules._destroy()  # else the next training on this CPU would have them too


def _in_float32(operator: Any, *args: Any, **kwargs: Any) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        args, kwargs = tree_map(_widened, (args, kwargs))
        return operator(*args, **kwargs)


def _widened(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype == torch.bfloat16
    return value.float() if is_half else value
