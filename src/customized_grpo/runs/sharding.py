"""FSDP2: every process keeps a part of each weight of the transformer, and gathers a block's parts
while it computes with them (arXiv:2304.11277; torch's ``fully_shard``).

A pass through the transformer is then a meeting of all processes: each has to take equally many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from customized_grpo.errors import ConfigError


def shard(
    transformer: Any, device: torch.device, num_ranks: int, dtype: torch.dtype | None = None
) -> None:
    """Splits the weights over the processes, block by block.

    Gradients of later backward passes come out as means over the processes.

    Args:
        transformer: of diffusers.
        device: of this process.
        num_ranks: processes.
        dtype: in which the weights are gathered and used, where autocast would cast them to it
            anyway: half the traffic, and no cast outlives the gathered weight. None: their own.
            Gradients are summed in float32.

    Raises:
        ConfigError: if diffusers names no repeated blocks in it.
    """
    names = getattr(transformer, "_repeated_blocks", None)
    if not names:
        raise ConfigError(
            f"fsdp must be false for {type(transformer).__name__}, got true; diffusers names no "
            "repeated blocks in it"
        )
    mesh = init_device_mesh(device.type, (num_ranks,))
    blocks = [module for module in transformer.modules() if type(module).__name__ in names]
    # Inputs stay as they are: autocast casts them where that is good for them.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False
    )
    for module in (*blocks, transformer):  # resharded after every pass: the optimizer's are parts
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


def is_sharded(module: nn.Module) -> bool:
    """Whether ``shard`` was called on it."""
    return isinstance(module, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, for which every process has to ask; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, other: Tensor) -> Tensor:
    """This process's part of a tensor, if the other one is sharded."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


@contextmanager
def gathered(module: nn.Module, *, here: bool) -> Iterator[None]:
    """Inside, the trained weights are whole where ``here``, on the CPU; every process has to come.

    The module must not be used inside but to be saved.
    """
    if not is_sharded(module):
        yield
        return
    sharded_class, parts = type(module), []
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad:
                full = whole(parameter.detach())
                if here:
                    parts.append((owner, name, parameter))
                    setattr(owner, name, nn.Parameter(full.cpu()))
    module.__class__ = sharded_class.__mro__[2]  # the file says which class it is of
    try:
        yield
    finally:
        module.__class__ = sharded_class
        for owner, name, parameter in parts:
            setattr(owner, name, parameter)
