"""The run folder and what a person sees while a run goes on."""

from __future__ import annotations

import json
import logging
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from customized_grpo.config import RunConfig, dump_config
from customized_grpo.errors import CheckpointError, ConfigError
from customized_grpo.files import sync, write_atomic
from customized_grpo.runs.files import (
    CONFIG,
    ENVIRONMENT,
    FINISHED,
    METRICS,
    STOPPED,
    WAITING,
    WAITING_SECONDS,
    holds_run,
)
from customized_grpo.runs.progress import LINE_SECONDS, heartbeat

logger = logging.getLogger("customized_grpo")

_LOCK, _ADVANTAGES = ".lock", "advantages.jsonl"
_BEGINNING = (_LOCK, ENVIRONMENT, f"{CONFIG}.")  # all there is before a run counts as begun


def run_folder(config: RunConfig, *, resume: bool = False) -> Path:
    """Where the run will write.

    Raises:
        ConfigError: if a run, or anything else that a run must not mix with, is already there.
    """
    folder = Path(config.output_dir) / config.name
    if not folder.exists() or (resume and holds_run(folder)):
        return folder
    if folder.is_dir() and all(path.name.startswith(_BEGINNING) for path in folder.iterdir()):
        return folder
    what = "a run" if holds_run(folder) else "something else"
    hint = ", or go on with it: `cgrpo resume`" if holds_run(folder) else ""
    raise ConfigError(
        f"name: {folder} already holds {what}; choose another --name or remove the folder{hint}"
    )


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """One process at a time has the folder, which is made if need be.

    Raises:
        CheckpointError: if another one has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / _LOCK, blocking=False):
            yield
    except Timeout as error:
        raise CheckpointError(
            f"{folder} is in use by another process; wait for it, or end it"
        ) from error


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
        for name in (STOPPED, WAITING):
            (folder / name).unlink(missing_ok=True)
        write_atomic(folder / ENVIRONMENT, json.dumps(describe_environment(device)) + "\n")
        write_atomic(folder / CONFIG, dump_config(config))
        self.folder = folder
        self._total, self._update = config.train.num_updates, 0
        self._progress: Any = None
        self._called = {  # as `cgrpo watch` has it
            f"reward/{reward.label}/mean": " ".join(dict.fromkeys((reward.objective, reward.label)))
            for reward in config.rewards
        }
        self._rewards = self._waits = ""
        self._first, self._started, self._said = 0, time.monotonic(), -math.inf
        self._waiting_said = -math.inf
        self._seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the wall time of the context to ``seconds/<stage>`` of the next row.

        Meanwhile the bar names the stage; without a bar a line does, each minute.
        """
        started = time.monotonic()
        with self._told(stage):
            yield
        elapsed = time.monotonic() - started
        self._seconds[stage] = self._seconds.get(stage, 0.0) + elapsed

    def _told(self, stage: str) -> AbstractContextManager[None]:
        if self._progress is None:
            after = f"after update {self._update} of {self._total}"
            return heartbeat(lambda: f"{self._waits or stage}, {after}")
        bar, task = self._progress
        bar.update(task, stage=stage)
        return nullcontext()

    def waits(self, what: str) -> None:
        """Says what the run waits for, and in ``waiting.json`` to those who watch; '' = nothing."""
        now, is_news = time.monotonic(), what != self._waits
        self._waits = what
        if not what:
            (self.folder / WAITING).unlink(missing_ok=True)
        elif is_news or now - self._waiting_said > WAITING_SECONDS / 4:
            self._waiting_said = now
            write_atomic(self.folder / WAITING, json.dumps({"what": what}) + "\n")
        if is_news and what:
            self._show_waiting(what)

    def _show_waiting(self, what: str) -> None:
        if self._progress is None:
            logger.info("%s", what)
        else:
            bar, task = self._progress
            bar.update(task, stage=what)

    def row(self, update: int, values: dict[str, float]) -> None:
        """Writes one line of metrics and moves the progress on."""
        seconds = {f"seconds/{name}": round(value, 4) for name, value in self._seconds.items()}
        self._seconds = {}
        row = {"update": update, **values, **seconds}
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._update = update
        if update:
            self._show(update, values)

    def rewind(self, *, update: int, rollouts: int) -> None:
        """Drops rows after ``update`` and of rollouts from number ``rollouts`` on: they come again.

        A line that was cut off while it was written goes too.
        """
        (self.folder / FINISHED).unlink(missing_ok=True)
        _keep_rows(self.folder / METRICS, lambda row: row["update"] <= update)
        _keep_rows(self.folder / _ADVANTAGES, lambda row: row["rollout"] < rollouts)

    def sync(self) -> None:
        """Waits until all rows are on the disk."""
        for name in (METRICS, _ADVANTAGES):
            if (self.folder / name).exists():
                sync(self.folder / name)

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
        with (self.folder / _ADVANTAGES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"rollout": rollout, **row}) + "\n")

    def finish(self, updates: int) -> None:
        """Writes ``finished.json``, the last file of a run: its weights are the last ones."""
        write_atomic(self.folder / FINISHED, json.dumps({"updates": updates}) + "\n")

    def stop(self, why: str) -> None:
        """Leaves word for those who watch, in ``stopped.json``, until the run goes on."""
        with suppress(OSError):  # a full disk is said by the error that stops the run
            write_atomic(self.folder / STOPPED, json.dumps({"why": why}) + "\n")

    def _show(self, update: int, values: dict[str, float]) -> None:
        rewards = "  ".join(
            f"{self._called[name]} {value:.3f}"
            for name, value in values.items()
            if name in self._called
        )
        self._rewards = rewards or self._rewards  # scored once per rollout, not per update
        if self._progress is not None:
            bar, task = self._progress
            bar.update(task, completed=update, rewards=self._rewards)
        elif self._is_worth_a_line(update, time.monotonic()):
            pace = (time.monotonic() - self._started) / (update - self._first)
            logger.info(
                "update %d/%d  %s  %.1f s/update, %.1f min left",
                update, self._total, self._rewards, pace, pace * (self._total - update) / 60,
            )  # fmt: skip

    def _is_worth_a_line(self, update: int, now: float) -> bool:
        """Every tenth update, and any that comes a minute or more after the last line."""
        is_late = now - self._said >= LINE_SECONDS
        if is_late or update == 1 or update % 10 == 0 or update == self._total:
            self._said = now
            return True
        return False

    @contextmanager
    def progress(self, update: int) -> Iterator[None]:
        """From ``update`` on; a rich bar while inside, if standard error is a terminal."""
        self._first, self._started = update, time.monotonic()
        self._said, self._update = self._started, update
        if not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TextColumn

        bar = Progress(
            *Progress.get_default_columns(),  # name, bar, share and time that is left
            MofNCompleteColumn(),
            TextColumn("{task.fields[stage]}"),
            TextColumn("{task.fields[rewards]}", markup=False),  # a reward's name may have brackets
            console=Console(stderr=True),
        )
        with bar:
            self._progress = (
                bar,
                bar.add_task("training", total=self._total, completed=update, rewards="", stage=""),
            )
            yield
        self._progress = None


class SilentLog(RunLog):
    """The log of a process that leaves the folder to another one; its stages are still timed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seconds: dict[str, float] = {}

    def _told(self, stage: str) -> AbstractContextManager[None]:
        return nullcontext()

    def _nothing(self, *_: Any, **__: Any) -> None:
        """What the other one writes."""

    row = waits = schedule = advantages = rewind = sync = finish = stop = _nothing

    def progress(self, update: int) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()


def _keep_rows(file: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and keep(json.loads(line)):
            kept.append(line)
    write_atomic(file, "".join(kept))
