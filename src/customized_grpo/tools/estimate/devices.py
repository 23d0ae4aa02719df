"""What devices can do at best: from their datasheets, and how fast this machine multiplies."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from customized_grpo.errors import ConfigError
from customized_grpo.registry import nearest, one_of

_SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024))
_GPU_SHAPES = ((8192, 8192, 8192), (8192, 4096, 4096), (16384, 3072, 12288))


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, and how it is linked to others; bytes and FLOPs per second."""

    name: str
    bf16: float  # dense bfloat16 matrix products, accumulated in float32
    float32: float  # float32 without TensorFloat-32, as PyTorch's default
    memory: float  # bytes
    bandwidth: float  # rate of its memory
    link: float  # to the others of a node of 8, one direction
    network: float
    """To other nodes, one direction; assumed: an InfiniBand or Ethernet port per device."""


# TFLOP/s without sparsity, GB, GB/s. NVIDIA's datasheets of A100 80GB SXM, H100 SXM, H200 SXM, HGX
# B200, L40S, and its Ada architecture whitepaper (RTX 4090); link: half of NVLink's or PCIe 4's
# total. cpu: one core of an AMD EPYC with AVX512_BF16, measured (421 and 96 GFLOP/s at 1024^3),
# the rest of its row assumed.
DEVICES = {
    name: Device(
        name=name, bf16=bf16 * 1e12, float32=float32 * 1e12, memory=memory * 1e9,
        bandwidth=bandwidth * 1e9, link=link * 1e9, network=network * 1e9,
    )
    for name, bf16, float32, memory, bandwidth, link, network in (
        ("a100-80gb", 312, 19.5, 80, 2039, 300, 25),
        ("h100", 989, 67, 80, 3350, 450, 50),
        ("h200", 989, 67, 141, 4800, 450, 50),
        ("b200", 2250, 75, 180, 8000, 900, 50),
        ("l40s", 362, 91.6, 48, 864, 32, 12.5),
        ("rtx4090", 165, 82.6, 24, 1008, 32, 3),
        ("cpu", 0.421, 0.096, 4, 10, 5, 1),
    )
}  # fmt: skip


def find_device(name: str) -> Device:
    """A device of the table, or a ConfigError if there is none of the name."""
    if name not in DEVICES:
        fix = nearest(name, DEVICES) or "take the one that is most alike"
        raise ConfigError(f"--device must be {one_of(DEVICES)}, got {name!r}; {fix}")
    return DEVICES[name]


def device_called(name: str) -> Device | None:
    """The one of the table that CUDA calls so, such as NVIDIA A100-SXM4-80GB; None: no such."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    for key, device in DEVICES.items():
        if all(part in letters for part in key.split("-")) and key != "cpu":
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
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Waits for what a GPU was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
