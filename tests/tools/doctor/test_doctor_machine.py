"""The machine: this one, and what a driver, a container or a small disk would say."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest
import torch

from customized_grpo import devices
from customized_grpo.devices import process_cores
from customized_grpo.tools.doctor import machine as machines
from customized_grpo.tools.doctor.findings import Finding
from customized_grpo.tools.doctor.machine import (
    Machine,
    Place,
    disk,
    hardware,
    look,
)

RAM = Place(name="RAM", total=10**10, free=10**10, is_gpu=False)


def found(machine: Machine) -> dict[str, Finding]:
    return {finding.check: finding for finding in hardware(machine)}


def gpu(total: float = 80e9, free: float = 80e9) -> Place:
    return Place(name="a GPU", total=int(total), free=int(free))


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A driver that knows one GPU."""
    file = tmp_path / "nvidia-smi"
    file.write_text(f"#!{sys.executable}\nprint('NVIDIA Test, 550.1')\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return file


def test_this_machine() -> None:
    machine = look()
    assert 0 < machine.ram.free <= machine.ram.total <= psutil.virtual_memory().total
    assert len(machine.gpus) == torch.cuda.device_count()
    assert found(machine)["ram"].found.startswith(f"{machine.ram.total / 1e9:.1f} GB")


def test_more_threads_than_cores() -> None:
    before = torch.get_num_threads()
    cores = process_cores()
    try:
        torch.set_num_threads(cores)
        assert found(Machine(ram=RAM))["cpu"].status == "ok"
        torch.set_num_threads(cores + 1)
        finding = found(Machine(ram=RAM))["cpu"]
    finally:
        torch.set_num_threads(before)
    assert finding.status == "warning"
    assert f"{cores} cores, threads of torch: {cores + 1}" in finding.found
    assert finding.fix == f"OMP_NUM_THREADS={cores}"


@pytest.mark.parametrize(
    ("visible", "status", "text", "fix"),
    [
        (None, "problem", "NVIDIA Test, 550.1 is there, torch 2.", "pytorch.org"),
        ("", "warning", "is hidden", "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_torch_does_not_see(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch, visible, status, text, fix
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    finding = found(Machine(ram=RAM))["gpu"]
    assert finding.status == status
    assert text in finding.found
    assert fix in finding.fix


def test_gpus_in_use(nvidia_smi: Path) -> None:
    gpus = (gpu(), gpu(free=50e9))
    findings = found(Machine(ram=RAM, gpus=gpus))
    assert findings["gpu 0"].status == "ok"
    assert "80.0 GB, driver 550.1" in findings["gpu 0"].found
    assert "only 50.0 GB not in use" in findings["gpu 1"].found
    assert findings["gpu 1"].status == "warning"


def test_no_gpu_where_there_is_no_driver_or_it_fails(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi.write_text(f"#!{sys.executable}\nraise SystemExit(9)\n")
    assert found(Machine(ram=RAM))["gpu"].status == "ok"
    monkeypatch.setenv("PATH", "")
    assert found(Machine(ram=RAM))["gpu"].status == "ok"


def test_limits_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    for memory, cpu in (("max", "max 100000"), (None, None)):
        for name, text in (("memory.max", memory), ("cpu.max", cpu)):
            (tmp_path / name).unlink(missing_ok=True)
            if text:
                (tmp_path / name).write_text(f"{text}\n")
        assert look().ram.total == psutil.virtual_memory().total
        assert process_cores() == 8
    (tmp_path / "memory.max").write_text("4000\n")
    (tmp_path / "cpu.max").write_text("15000 10000\n")
    assert (look().ram.total, look().ram.free) == (4000, 4000)
    assert process_cores() == 2


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = tmp_path / "not" / "yet"
    assert disk("disk", later).status == disk("disk", later, 1.0, "checkpoints").status == "ok"
    finding = disk("disk", later, 1e18, "checkpoints")
    assert finding.status == "problem"
    assert "checkpoints need 1000000000.0 GB" in finding.found
    assert finding.fix
    monkeypatch.setattr(machines, "free_space", lambda folder: 10**9)
    assert disk("disk", tmp_path).status == "warning"
