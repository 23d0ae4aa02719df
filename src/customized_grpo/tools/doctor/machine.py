"""Cores, memory, GPUs and disks."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from customized_grpo.devices import group_numbers, process_cores
from customized_grpo.tools.doctor.findings import Finding, gigabytes, ok, problem, warning

_LOW_DISK = 5e9  # bytes; a LoRA run of a 12-billion model keeps some GB of checkpoints


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A memory in which a run may be computed; bytes."""

    name: str
    total: int
    free: int  # what is not in use by others
    is_gpu: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where a run may be computed."""

    ram: Place
    gpus: tuple[Place, ...] = ()  # those that answer
    broken: Mapping[int, str] = field(default_factory=dict)
    """What CUDA says of the others, by their number."""

    def place(self, device: str) -> Place:
        """Where a single process on a config's ``device`` computes."""
        return self.gpus[0] if self.gpus and device != "cpu" else self.ram


def look() -> Machine:
    """This machine."""
    import torch

    gpus: list[Place] = []
    broken: dict[int, str] = {}
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        try:
            card = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
        except Exception as error:  # a GPU that is busy or broken: torch has many types for it
            broken[number] = (str(error).splitlines() or [type(error).__name__])[0]
        else:
            gpus.append(Place(name=card.name, total=total, free=free))
    memory = psutil.virtual_memory()
    limit = min([memory.total, *group_numbers("memory.max")])
    ram = Place(name="RAM", total=limit, free=min(memory.available, limit), is_gpu=False)
    return Machine(ram=ram, gpus=tuple(gpus), broken=broken)


def hardware(machine: Machine) -> Iterator[Finding]:
    """What is there, and what keeps it from being used."""
    yield _cpu()
    ram = machine.ram
    yield ok("ram", f"{gigabytes(ram.total)}, {gigabytes(ram.free)} of it available")
    yield from _gpus(machine) if machine.gpus or machine.broken else [_no_gpu()]


def _cpu() -> Finding:
    import torch

    cores, threads = process_cores(), torch.get_num_threads()
    found = f"{cores} cores, threads of torch: {threads}"
    if threads > cores:
        return warning("cpu", f"{found}: threads wait for each other", f"OMP_NUM_THREADS={cores}")
    return ok("cpu", found)


def _gpus(machine: Machine) -> Iterator[Finding]:
    import torch

    driver = (driver_lines() or ["unknown"])[0].split(", ")[-1]
    software = f"driver {driver}, CUDA {torch.version.cuda}"
    for number, error in machine.broken.items():
        fix = "end what uses it (nvidia-smi lists it), or choose others by CUDA_VISIBLE_DEVICES"
        yield problem(f"gpu {number}", f"it cannot be used: {error}", fix)
    numbers = (number for number in itertools.count() if number not in machine.broken)
    for number, gpu in zip(numbers, machine.gpus, strict=False):
        check, found = f"gpu {number}", f"{gpu.name}, {gigabytes(gpu.total)}, {software}"
        if gpu.free < 0.9 * gpu.total:
            fix = "end them (nvidia-smi lists them), or choose a GPU by CUDA_VISIBLE_DEVICES"
            yield warning(check, f"{found}: only {gigabytes(gpu.free)} not in use by others", fix)
        else:
            yield ok(check, found)


def _no_gpu() -> Finding:
    import torch

    seen = driver_lines()
    if not seen:
        return ok("gpu", "none, the CPU does the work")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return warning("gpu", f"{seen[0]} is hidden", "unset CUDA_VISIBLE_DEVICES")
    found = f"{seen[0]} is there, torch {torch.__version__} (CUDA: {torch.version.cuda}) sees none"
    fix = "update the driver, or install the torch for it: pytorch.org/get-started/locally"
    return problem("gpu", found, fix)


def driver_lines() -> list[str]:
    """``name, driver version`` of every NVIDIA GPU that the driver knows."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()]


def disk(check: str, folder: Path, needed: float = _LOW_DISK, what: str = "") -> Finding:
    """Free space where a folder is or will be, against the bytes that ``what`` needs.

    Without ``what`` less than ``needed`` is only worth a look.
    """
    free = free_space(folder)
    needs = f", {what} need {gigabytes(needed)}" if what else ""
    found = f"{gigabytes(free)} free at {folder}{needs}"
    if free >= needed:
        return ok(check, found)
    fix = "free some, or choose a folder on another disk"
    return problem(check, found, fix) if what else warning(check, found, fix)


def free_space(folder: Path) -> int:
    """Bytes free where a folder is or will be."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """The folder, or the first above it that is there and may be looked at."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if os.path.exists(path))
