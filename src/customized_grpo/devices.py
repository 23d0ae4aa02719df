"""The machine: its cores, the device that computes, and errors when memory or disk run out."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from customized_grpo.errors import ConfigError, ResourceError

_GROUP = Path("/sys/fs/cgroup")


def process_cores() -> int:
    """Cores this process may use: fewer than there are in containers and batch jobs."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    limit = group_numbers("cpu.max")  # microseconds in each period, of all cores together
    return min(cores, math.ceil(limit[0] / limit[1])) if len(limit) == 2 else cores


def group_numbers(name: str) -> list[int]:
    """Numbers in a file of the control group that a container sees as its own; 'max' is none."""
    try:
        words = (_GROUP / name).read_text(encoding="utf-8").split()
    except OSError:  # another system, or no container
        return []
    return [int(word) for word in words if word.isdecimal()]


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. Call it before the work: it prepares the CPU too.

    Raises:
        ConfigError: if CUDA is asked for and there is none.
    """
    available = name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("device: must be available, got 'cuda' and no GPU is visible; use 'auto'")
    if available:
        # With torch's default attention, gradients were NaN or a kernel read memory that was not
        # its own: on an H200 with torch 2.11 and cuDNN 9.19. Others found it in cuDNN's backward
        # pass, which torch prefers on Hopper (pytorch#196678, trl#7181); here it was not told
        # apart. `generator.attention: cudnn` still takes it.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # With its number: a thread that is started later has a current device of its own.
        return torch.device("cuda", torch.cuda.current_device())
    _keep_freed_memory()
    return torch.device("cpu")


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Inside, if it is wanted, torch takes only kernels that give the same bits each time, and
    raises a RuntimeError where it has none. To be entered before anything is on a GPU."""
    if not wanted:
        yield
        return
    cudnn: Any = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled()
    cudnn_before = cudnn.deterministic, cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        cudnn.deterministic, cudnn.benchmark = cudnn_before


def _keep_freed_memory() -> None:
    """Makes glibc's malloc keep large blocks. By default it maps each from the system and gives it
    back when it is freed, so that every activation is paid for in zeroed pages: a tenth of the
    time of a run on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # numbers of the parameters in malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


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
