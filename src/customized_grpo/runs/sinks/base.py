"""What a sink is."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from customized_grpo.config import SinkConfig
from customized_grpo.errors import needs_extra, within


class Sink(Protocol):
    """Takes the log of one run, in the order of the updates; anything may be raised."""

    def metrics(self, update: int, values: Mapping[str, float]) -> None:
        """Numbers of an update, by their names in ``metrics.jsonl``."""
        ...

    def picture(self, update: int, file: Path) -> None:
        """The grid of sample pictures after an update, a PNG."""
        ...

    def close(self, failed: bool) -> None:
        """The run has ended, or was stopped; returns when everything is where it belongs."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """What a sink is told about its run when it is opened."""

    folder: Path
    name: str
    config: dict[str, Any]
    """As the YAML has it, without what looks like a secret."""
    id: str
    """Names the run in this sink: the same when it is resumed, and no other's."""
    first: int
    """The first update whose numbers it will get; above 0, it goes on with what it got before."""


def check_sinks(sinks: Sequence[SinkConfig]) -> None:
    """Makes sure that the sinks can be opened.

    Raises:
        ConfigError: naming the sink, and what to install or to export.
    """
    for number, sink in enumerate(sinks):
        with within(f"sinks.{number}"):
            sink.check()


def need_package(name: str) -> None:
    """Imports a package, which is an extra of the same name.

    Raises:
        ConfigError: if it is not installed, or broken.
    """
    with needs_extra(name, f"type: {name!r}"):
        module = importlib.import_module(name)
        if getattr(module, "__file__", None) is None:  # a folder of that name, left by the package
            raise ImportError(f"No module named {name!r}")
