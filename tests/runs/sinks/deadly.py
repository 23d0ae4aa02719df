"""A run that is ended by a real SIGKILL at a chosen moment of what it tells its first sink.

python deadly.py CONFIG MOMENT UPDATE
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from customized_grpo.config import load_config
from customized_grpo.runs.sinks.feed import Feed
from customized_grpo.training.session import Session
from customized_grpo.training.train import train
from customized_grpo.training.validation import SampleGrid


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def noted(folder: Path, kind: str) -> int | None:
    """The last row or picture whose sending is noted."""
    try:
        (sent,) = json.loads((folder / "sinks" / "tensorboard.json").read_text())["sent"].values()
    except FileNotFoundError:
        return None
    return sent[kind]


def in_base_validation(update: int) -> None:
    """Its picture is sent and noted, its row is not there yet."""

    def deadly(self: Session) -> dict[str, float]:
        while noted(self.log.folder, "picture") != update:
            time.sleep(0.01)
        die()
        return {}

    Session._validate = deadly


def before_picture(update: int) -> None:
    """Its row is sent and noted, its picture is drawn and not yet there."""
    before = SampleGrid.save

    def deadly(self: SampleGrid, path: Path, now: Tensor) -> None:
        if path.stem == f"{update:06d}":
            while noted(path.parents[1], "row") != update:
                time.sleep(0.01)
            die()
        before(self, path, now)

    SampleGrid.save = deadly


def before_note(update: int) -> None:
    """Its row and its picture are sent; only the row is noted."""
    before = Feed._remember

    def deadly(self: Any) -> None:
        if self._sent["picture"] == update:
            die()
        before(self)

    Feed._remember = deadly


MOMENTS = {f.__name__: f for f in (in_base_validation, before_picture, before_note)}

if __name__ == "__main__":
    _, file, moment, update = sys.argv
    MOMENTS[moment](int(update))
    train(load_config(file), resume=True)
