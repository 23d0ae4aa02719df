"""TensorBoard event files in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from customized_grpo.config import SinkConfig
from customized_grpo.runs.sinks.base import RunInfo, need_package


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorBoardConfig(SinkConfig):
    """Event files in ``RUN/tensorboard``: ``tensorboard --logdir runs`` shows all runs."""

    type: Literal["tensorboard"] = "tensorboard"  # pyright: ignore[reportIncompatibleVariableOverride]

    def check(self) -> None:
        """The package is there."""
        need_package("tensorboard")

    def replaces(self) -> bool:
        """A new event file tells readers from where on to drop the points of the older ones."""
        return True

    def build(self, run: RunInfo) -> TensorBoardSink:
        """Opens a new event file."""
        return TensorBoardSink(run)


class TensorBoardSink:
    """A file for each life of the run; a reader drops what later ones replace."""

    def __init__(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.first)

    def metrics(self, update: int, values: Mapping[str, float]) -> None:
        """A point of every curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, update)
        self._writer.flush()

    def picture(self, update: int, file: Path) -> None:
        """Under ``samples``."""
        import numpy as np
        from PIL import Image

        with Image.open(file) as image:
            self._writer.add_image("samples", np.asarray(image), update, dataformats="HWC")
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Writes what is left."""
        self._writer.close()
