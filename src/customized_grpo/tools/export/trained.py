"""A run that is to be exported: its config, its weights and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from customized_grpo.config import RunConfig, load_config
from customized_grpo.errors import CheckpointError
from customized_grpo.generators.lora import LORA_FILE
from customized_grpo.runs.checkpoint import WEIGHTS, trained_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedRun:
    """The folder of a run with weights, opened."""

    folder: Path
    config: RunConfig
    weights: Path
    """Folder of the trained weights."""

    @classmethod
    def open(cls, folder: Path) -> TrainedRun:
        """Of a finished run, or of an unfinished one's newest checkpoint.

        Raises:
            CheckpointError: if the folder is no run with weights.
        """
        if not (folder / "config.yaml").exists():
            raise CheckpointError(
                f"RUN: {folder} must be the folder of a run, config.yaml is not in it"
            )
        config = load_config(folder / "config.yaml")
        return cls(folder=folder, config=config, weights=trained_weights(folder))

    @property
    def is_lora(self) -> bool:
        """Whether a LoRA was trained, or else all weights of the transformer."""
        return (self.weights / LORA_FILE).exists()

    @property
    def updates(self) -> int:
        """Optimizer updates that the weights have seen."""
        if self.weights == self.folder / WEIGHTS:
            return self.config.train.num_updates
        return int(self.weights.parent.name)

    @property
    def picture(self) -> Path | None:
        """References, prompts and pictures by base and tuned: of the evaluation, or else the last
        of the training; None if there is none."""
        samples = sorted((self.folder / "samples").glob("*.png"))
        found = [path for path in (self.folder / "evaluation.png",) if path.exists()]
        return (found or samples[-1:] or [None])[0]
