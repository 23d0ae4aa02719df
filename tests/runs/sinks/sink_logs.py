"""Logs that feed sinks, without training."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from customized_grpo.config import RunConfig, SinkConfig
from customized_grpo.runs.log import RunLog
from customized_grpo.runs.sinks.feed import feeding


class FedLog(RunLog):
    """A log whose folder is followed by sinks."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(Path(config.output_dir, config.name), config, torch.device("cpu"))
        self._sinks, self._run = config.sinks, config

    def feeding(self) -> AbstractContextManager[None]:
        return feeding(self._sinks, self._run, self.folder)


def with_sinks(config: RunConfig, *sinks: SinkConfig) -> RunConfig:
    return dataclasses.replace(config, sinks=sinks)


def open_log(config: RunConfig, *sinks: SinkConfig) -> FedLog:
    return FedLog(with_sinks(config, *sinks))


def add(log: FedLog, update: int) -> None:
    """A row with names and values as they come, and a picture after even updates."""
    log._seconds = {"update": 1.0}
    values = {"loss": update / 7, "reward/clip-text/mean": update / 3, "grad_norm": math.nan}
    if update == 0:
        values = {"validation/clip-text": 0.25}
    log.row(update, values)
    if update % 2 == 0:
        picture(log, update)


def picture(log: FedLog, update: int) -> None:
    file = log.folder / "samples" / f"{update:06d}.png"
    file.parent.mkdir(exist_ok=True)
    Image.new("RGB", (5, 3), (update, 0, 255)).save(file)


def live_and_die(log: FedLog) -> None:
    """Updates 0 to 6 in two lives: the first one comes to 4, the second goes on after 2."""
    with log.feeding():
        for update in range(5):
            add(log, update)
    log.rewind(update=2, rollouts=0)
    with log.feeding():
        for update in range(3, 7):
            add(log, update)


def points(run: Path) -> dict[str, dict[int, float]]:
    """Name -> update -> number, of ``metrics.jsonl``; NaN is None."""
    found: dict[str, dict[int, Any]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name != "update":
                found.setdefault(name, {})[row["update"]] = number(value)
    return found


def number(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
