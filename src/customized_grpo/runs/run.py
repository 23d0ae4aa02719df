"""The folder of a run, opened: what every command that looks at one goes through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from customized_grpo.assets import path_revision
from customized_grpo.config import RunConfig, load_config
from customized_grpo.errors import ConfigError
from customized_grpo.files import LORA_FILE
from customized_grpo.runs.checkpoint import WEIGHTS, trained_weights
from customized_grpo.runs.files import CONFIG, SAMPLES, check_run, finished_updates


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that has begun, wherever its folder has been moved to."""

    folder: Path
    config: RunConfig
    """As it was trained; ``name`` and ``output_dir`` are those of the folder."""

    @classmethod
    def open(cls, folder: Path, overrides: Sequence[str] = ()) -> Run:
        """Reads the config of a run's folder, with overrides such as ``--device cpu``.

        Raises:
            CheckpointError: if no run was begun in the folder; a project's folder is none.
            ConfigError: if the config or an override is wrong, or would move the run.
        """
        if folder.name != folder.resolve().name:  # ".", or a link of another name
            folder = folder.resolve()
        check_run(folder)
        config = load_config(folder / CONFIG, overrides, has_begun=True)
        stored = load_config(folder / CONFIG, has_begun=True) if overrides else config
        for field, own in (("name", folder.name), ("output_dir", str(folder.parent))):
            if (value := getattr(config, field)) not in (getattr(stored, field), own):
                raise ConfigError(
                    f"{field} must stay as it is, got {value!r}: the run is where its folder is, "
                    f"{folder}; to rename or move it, rename or move that"
                )
        return cls(
            folder=folder, config=replace(config, name=folder.name, output_dir=str(folder.parent))
        )

    @cached_property
    def weights(self) -> Path:
        """Folder of the trained weights: the end's, or else the newest checkpoint's.

        Raises:
            CheckpointError: if the run has written none yet.
        """
        return trained_weights(self.folder)

    @property
    def is_lora(self) -> bool:
        """Whether a LoRA was trained, or else all weights of the transformer."""
        return (self.weights / LORA_FILE).exists()

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end."""
        return finished_updates(self.folder) is not None

    @property
    def updates(self) -> int:
        """Optimizer updates that the weights have seen."""
        if self.weights == self.folder / WEIGHTS:
            return finished_updates(self.folder) or self.config.train.num_updates
        return int(self.weights.parent.name)

    @cached_property
    def digest(self) -> str | None:
        """SHA-256 of the trained weights."""
        return path_revision(str(self.weights))

    @property
    def sample(self) -> Path | None:
        """References, prompts and pictures by base and tuned: the last of the training that its
        weights may have drawn; None if there is none."""
        named = {p: p.stem for p in sorted((self.folder / SAMPLES).glob("*.png"))}
        drawn = [p for p, stem in named.items() if stem.isdecimal() and int(stem) <= self.updates]
        return drawn[-1] if drawn else None
