"""Errors of the machine, which come under many types: memory and disk that have run out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from customized_grpo.errors import ResourceError

# What torch's CPU allocator says, in a plain RuntimeError.
_HOST_MEMORY = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, on the host or on a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _HOST_MEMORY)


_SMALLER = (
    "train.micro_batch_size, rollout.batch_size or evaluation.batch_size, or set "
    "generator.gradient_checkpointing"
)


def machine_error(error: BaseException, smaller: str = _SMALLER) -> str | None:
    """One line for an error of the machine, None for any other; ``smaller``: what to lower."""
    if is_out_of_memory(error):
        where = "the GPU" if isinstance(error, torch.OutOfMemoryError) else "this machine"
        return f"{where} is out of memory; lower {smaller}"
    if isinstance(error, OSError):
        return f"{error.filename or 'the system'}: {error.strerror or error}"
    return None


@contextmanager
def memory_named(smaller: str = _SMALLER) -> Iterator[None]:
    """Turns memory that runs out inside into one line, which names what to lower.

    Raises:
        ResourceError: if it does.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(machine_error(error, smaller)) from error
