"""Checkpoints that were not trained, and a brake on a session's denoising."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from customized_grpo.config import RunConfig, load_config
from customized_grpo.files import LORA_FILE
from customized_grpo.tools.playground.session import Session

SECONDS = 120.0


def quick_config(folder: Path, **fields: Any) -> RunConfig:
    """configs/emoji.yaml with two denoising steps, in float32; ``folder`` is for runs."""
    flags = ["--output_dir", str(folder), "--mixed_precision", "no", "--rollout.num_steps", "2"]
    flags += ["--rollout.num_trained_steps", "1"]
    return dataclasses.replace(load_config(ROOT / "configs" / "emoji.yaml", flags), **fields)


def add_checkpoint(run: Path, update: int, factor: float) -> Path:
    """A checkpoint whose LoRA is the run's times a factor."""
    folder = run / "checkpoints" / f"{update:06d}" / "weights"
    folder.mkdir(parents=True)
    file = run / "weights" / LORA_FILE
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    scaled = {n: t * (factor if "lora_B" in n else 1) for n, t in load_file(file).items()}
    save_file(scaled, folder / LORA_FILE, metadata)
    return folder


class Gate:
    """Denoising steps of a session go through when they are let."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        """That have gone through."""
        self._begun = threading.Semaphore(0)
        self._let, self._num_begun = threading.Semaphore(0), 0
        velocity = session._base.velocity

        def wait_first(*arguments: Any) -> Tensor:
            self._begun.release()
            assert self._let.acquire(timeout=SECONDS)
            self.steps += 1
            return velocity(*arguments)

        monkeypatch.setattr(session._base, "velocity", wait_first)

    def go_to(self, step: int) -> None:
        """Lets all steps before this one through and waits until it has begun; steps count from 1
        and over all pictures."""
        for number in range(self._num_begun, step):
            if number:
                self._let.release()
            assert self._begun.acquire(timeout=SECONDS)
        self._num_begun = step

    def open(self) -> None:
        """Lets everything through."""
        self._let.release(10_000)
