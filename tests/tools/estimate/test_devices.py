"""The table of devices, and the measurement of this one."""

from __future__ import annotations

import pytest
import torch

from customized_grpo.errors import ConfigError
from customized_grpo.tools.estimate.devices import (
    DEVICES,
    find_device,
    matmul_peak,
)


def test_the_table_is_in_flops_and_bytes() -> None:
    assert find_device("h100") is DEVICES["h100"]
    for device in DEVICES.values():
        assert device.bf16 > device.float32 > 1e10
        assert device.memory >= 4e9
        assert device.bandwidth > device.link > device.network >= 1e9
    with pytest.raises(ConfigError, match=r"--device must be one of .*did you mean 'h100'"):
        find_device("h10")


def test_this_machine_is_measured() -> None:
    assert matmul_peak(torch.float32, torch.device("cpu"), [(64, 64, 64)], repeats=1) > 0
