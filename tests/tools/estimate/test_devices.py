"""The table of devices, and the measurement of this one."""

from __future__ import annotations

import re
import time

import pytest
import torch

from customized_grpo.errors import ConfigError
from customized_grpo.tools.doctor import machine as machines
from customized_grpo.tools.estimate import devices
from customized_grpo.tools.estimate.cards import RENTS
from customized_grpo.tools.estimate.devices import (
    DEVICES,
    changed_device,
    find_device,
    matmul_peak,
    this_cpu,
)


def test_the_table_is_in_flops_and_bytes() -> None:
    assert find_device("h100") is DEVICES["h100"]
    for device in DEVICES.values():
        assert device.bf16 > device.float32 > 1e10
        assert device.memory >= 4e9
        assert device.bandwidth > device.link > device.network >= 1e9
    with pytest.raises(ConfigError, match=r"--device must be one of .*did you mean 'h100'"):
        find_device("h10")


def test_rents_are_of_cards_in_the_table() -> None:
    assert set(RENTS) < set(DEVICES)
    for rent in RENTS.values():
        assert rent.price > 0
        assert re.fullmatch(r"20\d\d-[01]\d", rent.when)


def test_a_card_that_is_not_listed_is_one_with_other_numbers() -> None:
    h100 = DEVICES["h100"]
    assert changed_device(h100, None, None) == h100
    half = changed_device(h100, 494.5, 40)
    assert half.name == "h100 with 494.5 TFLOP/s and 40 GB"
    assert (half.bf16, half.float32, half.memory) == (494.5e12, 33.5e12, 40e9)
    assert half.bandwidth == h100.bandwidth


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of this process alone: a machine that is busy otherwise looked slow."""
    assert matmul_peak(torch.float32, torch.device("cpu"), [(64, 64, 64)], repeats=1) > 0
    clocks = {"perf_counter": iter(range(0, 1000, 100)), "process_time": iter(range(10))}
    for name, clock in clocks.items():
        monkeypatch.setattr(time, name, lambda clock=clock: next(clock))
    peak = matmul_peak(torch.float32, torch.device("cpu"), [(64, 64, 64)], repeats=1)
    assert peak == 2 * 64**3 * torch.get_num_threads()


def test_the_cpu_is_this_one_with_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "matmul_peak", lambda dtype, *_: float(dtype.itemsize))
    monkeypatch.setattr(machines, "group_numbers", lambda name: [8 * 10**9])
    cpu = this_cpu()
    assert (cpu.bf16, cpu.float32) == (2, 4)
    assert cpu.memory <= 8e9
    assert f"({torch.get_num_threads()} thread" in cpu.name
    assert find_device("cpu") == cpu
