"""The run folder and what a person sees while a run goes on."""

from __future__ import annotations

import json
import logging
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customized_grpo.config import RunConfig, dump_config
from customized_grpo.errors import ConfigError
from customized_grpo.files import write_atomic

logger = logging.getLogger("customized_grpo")

FINISHED = "finished.json"


def run_folder(config: RunConfig) -> Path:
    """Where the run will write.

    Raises:
        ConfigError: if a run of that name is already there.
    """
    folder = Path(config.output_dir) / config.name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"name: {folder} already holds a run; choose another --name or remove the folder"
        )
    return folder


def describe_environment(device: torch.device) -> dict[str, str]:
    """Machine and versions, for whoever wants to repeat the run."""
    packages = ("customized-grpo", "torch", "diffusers", "transformers", "peft", "accelerate")
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class RunLog:
    """Appends ``metrics.jsonl``; shows a live bar on a terminal, plain lines elsewhere."""

    def __init__(self, folder: Path, config: RunConfig, device: torch.device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "config.yaml", dump_config(config))
        write_atomic(folder / "environment.json", json.dumps(describe_environment(device)) + "\n")
        self.folder = folder
        self._total = config.train.num_updates
        self._progress: Any = None
        self._rewards = ""
        self._started = time.monotonic()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the wall time of the context to ``seconds/<stage>`` of the next row."""
        started = time.monotonic()
        yield
        elapsed = time.monotonic() - started
        self._seconds[stage] = self._seconds.get(stage, 0.0) + elapsed

    def row(self, update: int, values: dict[str, float]) -> None:
        """Writes one line of metrics and moves the progress on."""
        seconds = {f"seconds/{name}": round(value, 4) for name, value in self._seconds.items()}
        self._seconds = {}
        row = {"update": update, **values, **seconds}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if update:
            self._show(update, values)

    def schedule(self, sigmas: Tensor, weights: Tensor, objectives: Sequence[str]) -> None:
        """Writes ``schedule.json``: the noise levels and the objectives' weights at each step."""
        content = {
            "objectives": list(objectives),
            "sigmas": sigmas.tolist(),
            "weights": weights.tolist(),
        }
        write_atomic(self.folder / "schedule.json", json.dumps(content) + "\n")

    def advantages(self, rollout: int, advantages: Tensor, objectives: Sequence[str]) -> None:
        """Appends a rollout's advantages ``[B, N]`` to ``advantages.jsonl``; null = unscorable."""
        columns = zip(objectives, advantages.T.tolist(), strict=True)
        row = {
            name: [None if math.isnan(value) else round(value, 4) for value in column]
            for name, column in columns
        }
        with (self.folder / "advantages.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"rollout": rollout, **row}) + "\n")

    def finish(self, updates: int) -> None:
        """Writes ``finished.json``, the last file of a run: its weights are the last ones."""
        write_atomic(self.folder / FINISHED, json.dumps({"updates": updates}) + "\n")

    def _show(self, update: int, values: dict[str, float]) -> None:
        rewards = "  ".join(
            f"{name.split('/')[1]} {value:.3f}"
            for name, value in values.items()
            if name.startswith("reward/") and name.endswith("/mean")
        )
        self._rewards = rewards or self._rewards  # scored once per rollout, not per update
        if self._progress is not None:
            bar, task = self._progress
            bar.update(task, completed=update, rewards=self._rewards)
        elif update == 1 or update % 10 == 0 or update == self._total:
            pace = (time.monotonic() - self._started) / update
            logger.info(
                "update %d/%d  %s  %.1f s/update, %.1f min left",
                update, self._total, self._rewards, pace, pace * (self._total - update) / 60,
            )  # fmt: skip

    @contextmanager
    def progress(self) -> Iterator[None]:
        """A rich progress bar while inside, if standard error is a terminal."""
        if not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rewards]}"),
            console=Console(stderr=True),
        )
        with bar:
            self._progress = (bar, bar.add_task("training", total=self._total, rewards=""))
            yield
        self._progress = None
