"""The machine: `deterministic` and what a GPU does without; CUDA's calls are stand-ins."""

from __future__ import annotations

import dataclasses
import errno
import os

import pytest
import torch
from safetensors.torch import load_file

import customized_grpo.training.train as starting
from customized_grpo.config import RunConfig
from customized_grpo.devices import machine_error, pick_device
from customized_grpo.training.train import train


def switches() -> tuple[bool, bool, bool, str | None]:
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


@pytest.mark.slow
def test_a_deterministic_run_takes_kernels_that_repeat_themselves(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before, seen = switches(), []
    monkeypatch.setattr(
        starting, "pick_device", lambda name: (seen.append(switches()), pick_device(name))[1]
    )
    weights = []
    for wanted in (False, True):  # torch has such a kernel for everything a run does
        run = train(dataclasses.replace(tiny_config, name=f"{wanted}", deterministic=wanted))
        weights.append(load_file(run / "weights" / "pytorch_lora_weights.safetensors"))
    assert seen == [before, (True, True, False, ":4096:8")]
    assert switches()[:3] == before[:3]
    plain, repeatable = weights
    assert all(torch.equal(plain[name], repeatable[name]) for name in plain)


def test_a_gpu_does_without_cudnns_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert pick_device("auto") == torch.device("cuda", 0)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"), "x: No space left on device"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "the system: Too many open files"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "x"), "x: Read-only file system"),
        (MemoryError(), "this machine is out of memory; lower this"),
        (RuntimeError("can't allocate memory: you"), "this machine is out of memory; lower this"),
        (RuntimeError("a bug"), None),
    ],
)
def test_what_runs_out_is_one_line(error: Exception, line: str | None) -> None:
    assert machine_error(error, "this") == line
