"""Sinks for tests, by import path: one that writes down what it gets, and some that fail."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from customized_grpo.config import SinkConfig
from customized_grpo.runs.sinks.base import RunInfo


@dataclass(frozen=True, kw_only=True)
class RecorderConfig(SinkConfig):
    type: Literal["recorder"] = "recorder"  # pyright: ignore
    file: str
    again: bool = False
    stops: bool = False
    """Whether it ends the run at the first update, as a cluster does, and is slow to close."""

    def check(self) -> None:
        pass

    def starts_over(self) -> bool:
        return self.again

    def build(self, run: RunInfo) -> Recorder:
        return Recorder(Path(self.file), run, self.stops)


class Recorder:
    def __init__(self, file: Path, run: RunInfo, stops: bool) -> None:
        self._file, self._stops = file, stops
        self._write("open", run.first, id=run.id, name=run.name, config=run.config)

    def _write(self, what: str, update: int, **values: Any) -> None:
        with self._file.open("a") as file:
            line = {"what": what, "update": update, "pid": os.getpid(), **values}
            file.write(json.dumps(line) + "\n")

    def metrics(self, update: int, values: dict[str, float]) -> None:
        self._write("metrics", update, values=values)
        if self._stops and update == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def picture(self, update: int, file: Path) -> None:
        self._write("picture", update, bytes=len(file.read_bytes()))

    def close(self, failed: bool) -> None:
        time.sleep(5.0 if self._stops else 0.0)
        self._write("close", -1, failed=failed)


@dataclass(frozen=True, kw_only=True)
class FailingConfig(SinkConfig):
    type: Literal["failing"] = "failing"  # pyright: ignore
    api_key: str = "k3y-in-the-config"

    def check(self) -> None:
        pass

    def build(self, run: RunInfo) -> Failing:
        return Failing()


class Failing:
    def metrics(self, update: int, values: dict[str, float]) -> None:
        raise ConnectionError(f"no\nroute to {os.environ.get('SINK_TOKEN')}")

    picture = close = metrics  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class HangingConfig(SinkConfig):
    type: Literal["hanging"] = "hanging"  # pyright: ignore

    def check(self) -> None:
        pass

    def build(self, run: RunInfo) -> Hanging:
        return Hanging()


class Hanging:
    released = threading.Event()

    def metrics(self, update: int, values: dict[str, float]) -> None:
        self.released.wait()

    def picture(self, update: int, file: Path) -> None:
        pass

    def close(self, failed: bool) -> None:
        pass
