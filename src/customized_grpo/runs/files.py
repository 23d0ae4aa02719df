"""What lies in a run folder, for those who only look; nothing heavy is imported."""

from __future__ import annotations

import errno
import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

from customized_grpo.errors import CheckpointError

CONFIG, ENVIRONMENT = "config.yaml", "environment.json"
METRICS, FINISHED, STOPPED = "metrics.jsonl", "finished.json", "stopped.json"
WAITING = "waiting.json"
WAITING_SECONDS = 60.0
"""A run that waits says so again before these are over."""
CHECKPOINTS, SAMPLES, FAILURES = "checkpoints", "samples", "failures"
START = "start"
"""The LoRA of ``lora.path`` as the run read it."""


def holds_run(folder: Path) -> bool:
    """Whether a run was begun there; a project has a config too, and no environment."""
    return (folder / CONFIG).exists() and (folder / ENVIRONMENT).exists()


def check_run(folder: Path) -> None:
    """Raises a CheckpointError that leads on if no run was begun in a folder."""
    if not holds_run(folder):
        missing = ENVIRONMENT if (folder / CONFIG).exists() else CONFIG
        raise CheckpointError(
            f"RUN: {folder} must be the folder of a run, {missing} is not in it"
            f"{hint_at_run(folder)}"
        )


def hint_at_run(folder: Path) -> str:
    """Ends an error about a folder, where it is a project's that was taken for a run."""
    config = folder / CONFIG
    if holds_run(folder) or not config.exists():
        return ""
    runs = [path for path in sorted((folder / "runs").glob("*")) if holds_run(path)]
    if runs:
        return f"; it is a project, write {runs[-1]}"
    return f"; begin: `cgrpo train {shlex.quote(str(config))}`"


def finished_updates(folder: Path) -> int | None:
    """Updates of the finished run in a folder; None: it is not finished."""
    return _said(folder / FINISHED, "updates")


def why_stopped(folder: Path) -> str | None:
    """What has ended the run in a folder, and how it goes on; None: it has not said anything."""
    return _said(folder / STOPPED, "why")


def what_awaited(folder: Path) -> str | None:
    """What the run in a folder waits for, and has said within the last minute; None: nothing."""
    try:
        age = time.time() - (folder / WAITING).stat().st_mtime
        return _said(folder / WAITING, "what") if age < WAITING_SECONDS else None
    except FileNotFoundError:
        return None


def _said(file: Path, name: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))[name]
    except FileNotFoundError:
        return None


def checkpoint_folders(run: Path) -> list[Path]:
    """All of a run, the oldest first; left-overs of an interrupted write are none."""
    folder = run / CHECKPOINTS
    found = folder.iterdir() if folder.is_dir() else ()
    named = (path for path in found if path.is_dir() and path.name.isdecimal())
    return sorted(named, key=lambda path: int(path.name))


class MetricsReader:
    """The rows of a ``metrics.jsonl`` that grows meanwhile, perhaps on another machine.

    A line counts when it is whole. Rows that come again, after a resume, replace the former ones.
    """

    def __init__(self, run: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self.written: float | None = None
        """When the file was last changed, by the clock of whoever did it."""
        self._file = run / METRICS
        self._inode, self._end = -1, 0

    def read(self) -> bool:
        """Takes in what is new; returns whether there was anything.

        Raises:
            OSError: if there is a file that cannot be read.
        """
        try:
            with self._file.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._end:
                    self.rows, self._inode, self._end = [], status.st_ino, 0
                file.seek(self._end)
                text = file.read()
        except FileNotFoundError:
            self.rows, self.written, self._inode, self._end = [], None, -1, 0
            return False
        except OSError as error:
            if error.errno != errno.ESTALE:  # replaced on a network file system just now
                raise
            return False
        text = text[: text.rfind(b"\n") + 1]
        self._end += len(text)
        for line in text.splitlines():
            self._add(line)
        changed, self.written = status.st_mtime != self.written, status.st_mtime
        return changed

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            update = row["update"]
        except (ValueError, TypeError, KeyError):  # cut off by a crash, then written after
            return
        while self.rows and self.rows[-1]["update"] >= update:
            self.rows.pop()
        self.rows.append(row)
