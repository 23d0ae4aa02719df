"""What devices can do at best: from their datasheets, and how fast this machine multiplies."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from customized_grpo.errors import ConfigError
from customized_grpo.registry import nearest, one_of
from customized_grpo.tools.doctor.machine import look

_SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024))
_GPU_SHAPES = ((8192, 8192, 8192), (8192, 4096, 4096), (16384, 3072, 12288))


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, and how it is linked to others; bytes and FLOPs per second."""

    name: str
    bf16: float  # dense bfloat16 matrix products, accumulated in float32
    float32: float  # float32 without TensorFloat-32, as PyTorch's default
    memory: float  # bytes that CUDA has to give, less than the card is named for
    bandwidth: float  # rate of its memory
    link: float  # to the others of a node of 8, one direction
    network: float
    """To other nodes, one direction; assumed: an InfiniBand or Ethernet port per device."""
    is_cpu: bool = False
    sold_as: int = 0
    """GB by which it is called."""


CPU = "cpu"
_LESSER = ("laptop", "mobile", "maxq", "mig")  # slower than the card of that name, or a part of it

# TFLOP/s without sparsity; GB by name, GiB that CUDA reports (its messages when memory runs out, in
# public issues); GB/s. NVIDIA's datasheets of the cards, and its whitepapers of GA102
# (RTX 3090), Ada (RTX 4090) and Blackwell (RTX 5090), whose bfloat16 products are half as fast with
# float32 sums as without; link: half of NVLink's or PCIe's total.
DEVICES = {
    name: Device(
        name=name, bf16=bf16 * 1e12, float32=float32 * 1e12, memory=memory * 2**30,
        bandwidth=bandwidth * 1e9, link=link * 1e9, network=network * 1e9, sold_as=sold_as,
    )
    for name, bf16, float32, sold_as, memory, bandwidth, link, network in (
        ("rtx3090", 71, 35.6, 24, 23.5, 936, 32, 3),
        ("rtx4090", 165, 82.6, 24, 23.5, 1008, 32, 3),
        ("rtx5090", 209, 104.8, 32, 31.4, 1792, 64, 3),
        ("l4", 121, 30.3, 24, 22.0, 300, 32, 12.5),
        ("a10g", 70, 35, 24, 22.0, 600, 32, 12.5),
        ("a6000", 155, 38.7, 48, 47.4, 768, 32, 12.5),
        ("l40s", 362, 91.6, 48, 44.4, 864, 32, 12.5),
        ("a100-40gb", 312, 19.5, 40, 39.4, 1555, 300, 25),
        ("a100-80gb", 312, 19.5, 80, 79.1, 2039, 300, 25),
        ("h100", 989, 67, 80, 79.1, 3350, 450, 50),
        ("h200", 989, 67, 141, 139.7, 4800, 450, 50),
        ("b200", 2250, 75, 180, 178.3, 8000, 900, 50),
    )
}  # fmt: skip


def find_device(name: str) -> Device:
    """A device of the table, or this machine's CPU; a ConfigError if none has the name."""
    if name == CPU:
        return this_cpu()
    if name not in DEVICES:
        names = (*DEVICES, CPU)
        fix = nearest(name, names) or "for another card write --tflops and --memory"
        raise ConfigError(f"--device must be {one_of(names)}, got {name!r}; {fix}")
    return DEVICES[name]


def changed_device(device: Device, tflops: float | None, gigabytes: float | None) -> Device:
    """A card that is not listed: ``device`` with other numbers.

    Args:
        device: the one that is most alike.
        tflops: of dense bfloat16 products; those of float32 change in proportion.
        gigabytes: of memory.
    """
    share = 1.0 if tflops is None else tflops * 1e12 / device.bf16
    numbers = ((tflops, "TFLOP/s"), (gigabytes, "GB"))
    changed = [f"{number:g} {unit}" for number, unit in numbers if number is not None]
    return replace(
        device,
        name=f"{device.name} with {' and '.join(changed)}" if changed else device.name,
        bf16=device.bf16 * share,
        float32=device.float32 * share,
        memory=device.memory if gigabytes is None else gigabytes * 1e9,
    )


def this_cpu() -> Device:
    """This machine's CPU with torch's threads: products are measured, bandwidths assumed."""
    threads, cpu, shapes = torch.get_num_threads(), torch.device("cpu"), _SHAPES[:1]
    return Device(
        name=f"this CPU ({threads} {'thread' if threads == 1 else 'threads'})",
        bf16=matmul_peak(torch.bfloat16, cpu, shapes),
        float32=matmul_peak(torch.float32, cpu, shapes),
        memory=look().ram.total,
        bandwidth=10e9,
        link=5e9,
        network=1e9,
        is_cpu=True,
    )


def device_called(name: str) -> Device | None:
    """The one of the table that CUDA calls so, such as NVIDIA A100-SXM4-80GB; None: no such."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    known = {*words, *map("".join, pairwise(words))}  # RTX 4090
    if not known.isdisjoint(_LESSER):
        return None
    for key, device in DEVICES.items():
        if known.issuperset(key.split("-")):
            return device
    return None


def matmul_peak(
    dtype: torch.dtype,
    device: torch.device,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    repeats: int = 5,
) -> float:
    """FLOP/s of the fastest matrix product ``[m, k] @ [k, n]`` among ``shapes`` (m, k, n).

    The best of ``repeats``: what the machine can do, not what it did.
    """
    best = 0.0
    for m, k, n in shapes or (_SHAPES if device.type == "cpu" else _GPU_SHAPES):
        left = torch.randn(m, k, device=device).to(dtype)
        right = torch.randn(k, n, device=device).to(dtype)

        def multiply(left: torch.Tensor = left, right: torch.Tensor = right) -> object:
            return left @ right

        best = max(best, 2 * m * k * n / _fastest(multiply, device, repeats))
    return best


def _fastest(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        synchronize(device)
        start = _clock(device)
        function()
        synchronize(device)
        seconds.append(_clock(device) - start)
    return min(seconds[1:])


def _clock(device: torch.device) -> float:
    """Seconds; on a CPU only those in which it worked for this process, whatever else it does."""
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    return time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Waits for what a GPU was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
