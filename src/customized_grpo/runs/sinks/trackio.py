"""trackio: a database on this machine, or a Space of the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from customized_grpo.config import SinkConfig
from customized_grpo.errors import ConfigError
from customized_grpo.runs.sinks.base import RunInfo, need_package


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackioConfig(SinkConfig):
    """A run of a project, in the folder ``TRACKIO_DIR`` or in a Space."""

    type: Literal["trackio"] = "trackio"  # pyright: ignore[reportIncompatibleVariableOverride]

    project: str = "customized-grpo"
    """Project of the run."""

    space: str | None = None
    """Space ``user/name`` that shows it, made if need be, private; null = on this machine."""

    def check(self) -> None:
        """Package and, for a Space, token are there.

        Raises:
            ConfigError: if one is not.
        """
        need_package("trackio")
        if self.space is not None:
            from huggingface_hub import get_token

            if get_token() is None:
                raise ConfigError(
                    f"space: {self.space!r} needs the environment variable HF_TOKEN, got nothing; "
                    "export it"
                )

    def place(self) -> str:
        """The project, and where trackio looks for it."""
        names = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_DIR")
        found = (value for name in names if (value := os.environ.get(name)))
        return f"{self.project} {self.space or next(found, None)}"

    def build(self, run: RunInfo) -> TrackioSink:
        """Begins a run, or goes on with it."""
        return TrackioSink(self, run)


class TrackioSink:
    """trackio knows a run by its name, so a part of the id is in it."""

    def __init__(self, config: TrackioConfig, run: RunInfo) -> None:
        import trackio

        self._run = trackio.init(
            project=config.project,
            name=f"{run.name}-{run.id[:6]}",
            space_id=config.space,
            config=run.config,
            resume="allow",
            private=True,  # a Space that is made now; it would be public
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def metrics(self, update: int, values: Mapping[str, float]) -> None:
        """The update is trackio's step."""
        self._run.log(dict(values), step=update)

    def picture(self, update: int, file: Path) -> None:
        """Under ``samples``."""
        import trackio

        self._run.log({"samples": trackio.Image(str(file))}, step=update)

    def close(self, failed: bool) -> None:
        """Waits until it is written."""
        self._run.finish()
