"""Pictures of your own prompts and references: by the base, and by what was trained of it.

A picture depends on its seed, prompt and references alone: its noise is drawn from its own seed, so
that it is the same in any batch, up to the rounding of the device.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from customized_grpo.config import RunConfig, load_config
from customized_grpo.data.images import File, Picture, check_pictures
from customized_grpo.data.jsonl import read_entries
from customized_grpo.data.listed import Entry, PictureCache, complete, outline
from customized_grpo.data.texts import check_text
from customized_grpo.devices import memory_named
from customized_grpo.errors import CheckpointError, ConfigError
from customized_grpo.evaluation.outcome import BASE
from customized_grpo.files import write_atomic
from customized_grpo.generators.base import Generator
from customized_grpo.generators.cache import CachedEncoder
from customized_grpo.generators.lora import LORA_FILE, set_strength
from customized_grpo.pictures import png, save_grid
from customized_grpo.runs.checkpoint import trained_weights
from customized_grpo.training.build import build_generator, load_trained
from customized_grpo.training.rollout import FixedSampler, pick_device
from customized_grpo.types import Example

TUNED = "tuned"
_SHEET_ROWS = 25
LESS_MEMORY = "set generator.offload, generator.dtype or generator.quantization in the config"
_PACKAGES = ("customized-grpo", "torch", "diffusers", "transformers", "peft")


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A generator as a config says, and what was trained of it."""

    config: RunConfig
    weights: Path | None = None
    """Folder of trained weights; None: there is the base only."""

    @property
    def is_lora(self) -> bool:
        """Whether the weights are a LoRA, whose strength can be chosen."""
        return self.weights is not None and (self.weights / LORA_FILE).exists()


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A picture to make."""

    entry: Entry
    seed: int

    def file_name(self, number: int, column: str) -> str:
        """``number`` counts the tasks from 1."""
        words = re.sub(r"[^a-z0-9]+", "-", self.entry.prompt.lower())[:40].strip("-")
        parts = [f"{number:04d}", words, f"seed{self.seed}", column]
        return "-".join(part for part in parts if part) + ".png"


def find_model(target: Path, lora: Path | None = None) -> Model:
    """The base and trained weights of a run's folder, or of a config file and ``--lora``.

    Raises:
        CheckpointError: if the folder is no run with weights, or ``lora`` holds none.
        ConfigError: if the config is not valid, or both name weights.
    """
    if not os.path.exists(target):
        raise CheckpointError(
            f"TARGET must be the folder of a run or a config file, got {str(target)!r}, which is "
            "not there; check the path, or train first: `cgrpo train CONFIG`"
        )
    if target.is_dir():
        if not (target / "config.yaml").exists():
            raise CheckpointError(
                f"TARGET: {target} must be the folder of a run or a config file, config.yaml is "
                "not in it"
            )
        if lora is not None:
            raise ConfigError(
                f"--lora must be left out with the folder of a run, which has weights of its own, "
                f"got {str(lora)!r}; give {target / 'config.yaml'} as TARGET"
            )
        return Model(config=load_config(target / "config.yaml"), weights=trained_weights(target))
    if lora is not None and not any((lora / name).exists() for name in (LORA_FILE, "transformer")):
        raise CheckpointError(
            f"--lora: {lora} must hold {LORA_FILE}, it is missing; give RUN/weights, "
            "RUN/checkpoints/000050/weights or an exported LoRA"
        )
    return Model(config=load_config(target), weights=lora)


def read_prompts(
    prompts: Sequence[str], references: Sequence[Path], file: Path | None
) -> Sequence[Entry]:
    """Entries of every prompt with all references, or of a JSONL file.

    Raises:
        ConfigError: if there are neither or both.
        DataError: if a prompt is empty, or a picture or the file cannot be read.
    """
    if file is not None:
        if prompts or references:
            raise ConfigError("--file must be left out with --prompt and --reference; give either")
        return read_entries(file)
    if not prompts or not references:
        missing = "--reference" if prompts else "--prompt"
        raise ConfigError(f"{missing} must be given, got none; or give a --file of prompts")
    files: list[File] = [(path, "RGB") for path in references]
    found = check_pictures(dict.fromkeys(files, "--reference"))
    pictures = tuple(found[file] for file in files)
    texts = [check_text("--prompt", {"text": prompt}, "text") for prompt in prompts]
    return [Entry(id=str(i), prompt=t, references=pictures) for i, t in enumerate(texts)]


def generate(
    model: Model,
    tasks: Sequence[Task],
    out: Path,
    *,
    base: bool = True,
    strength: float | None = None,
    batch_size: int | None = None,
    metadata: bool = True,
) -> list[Path]:
    """Writes a PNG for every task and model into ``out``; returns the contact sheets.

    Args:
        model: what makes the pictures.
        tasks: what they shall show.
        out: a new or empty folder; pictures appear in it as they are made.
        base: whether the base makes them too, beside the trained weights.
        strength: of the LoRA; None: 1.
        batch_size: pictures made together; None: the config's ``evaluation.batch_size``.
        metadata: whether a PNG says how it was made.

    Raises:
        ConfigError: if an option has no effect on this model, or ``out`` holds something.
        DataError: if the generator cannot take the references.
    """
    columns = [*([BASE] if base else []), *([TUNED] if model.weights else [])]
    _check(model, columns, strength, out)
    generator = build_generator(model.config, pick_device(model.config.device))
    for task in tasks:
        generator.check(outline(task.entry))
    out.mkdir(parents=True, exist_ok=True)
    painter = _Painter(generator, model, out, batch_size, 1.0 if strength is None else strength)
    with _bar(len(tasks) * len(columns)) as bar, memory_named(f"--batch-size, or {LESS_MEMORY}"):
        for column in columns:
            if column == TUNED and model.weights is not None:
                load_trained(generator, model.weights, model.config.mixed_precision)
                if model.is_lora:
                    set_strength(generator.transformer, painter.strength)
            for done in painter.paint(tasks, column, metadata):
                bar.advance(bar.task_ids[0], done)
    return _write_sheets(tasks, columns, out)


def seeded_sampler(
    generator: Generator,
    config: RunConfig,
    examples: Sequence[Example],
    seeds: Sequence[int],
    encode: CachedEncoder,
) -> FixedSampler:
    """Draws every example from the noise of its own seed."""
    noise = [generator.noise(1, torch.Generator().manual_seed(seed)) for seed in seeds]
    return FixedSampler(generator, config, examples, encode=encode, noise=torch.cat(noise))


def num_steps(config: RunConfig) -> int:
    """Denoising steps of a picture."""
    return config.evaluation.num_steps or config.rollout.num_steps


def _check(model: Model, columns: Sequence[str], strength: float | None, out: Path) -> None:
    if not columns:
        raise ConfigError("--no-base must be left out where TARGET has no weights; add --lora")
    if strength is not None and not math.isfinite(strength):
        raise ConfigError(f"--strength must be a finite number, got {strength}; 1 = as trained")
    if strength is not None and not model.is_lora:
        raise ConfigError(f"--strength must be left out where there is no LoRA, got {strength}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out must be a new or empty folder, got {str(out)!r}; name another")


class _Painter:
    """Samples in batches and writes what comes out."""

    def __init__(
        self,
        generator: Generator,
        model: Model,
        out: Path,
        batch_size: int | None,
        strength: float,
    ) -> None:
        self._generator, self._model, self._out = generator, model, out
        self.strength = strength
        config = model.config
        self._size = batch_size or config.evaluation.batch_size
        self._config = replace(config, evaluation=replace(config.evaluation, batch_size=self._size))
        self._encode = CachedEncoder(generator, config.generator, config.cache)
        self._pictures = PictureCache()

    def paint(self, tasks: Sequence[Task], column: str, metadata: bool) -> Iterator[int]:
        """Writes the pictures; yields how many there are more after every batch."""
        for first in range(0, len(tasks), self._size):
            batch = tasks[first : first + self._size]
            for place, image in enumerate(self._sample(batch)):
                task = batch[place]
                path = self._out / task.file_name(first + place + 1, column)
                write_atomic(path, png(image, self._story(task, column) if metadata else None))
            yield len(batch)

    def _sample(self, batch: Sequence[Task]) -> Tensor:
        examples = [complete(task.entry, self._pictures) for task in batch]
        seeds = [task.seed for task in batch]
        return seeded_sampler(self._generator, self._config, examples, seeds, self._encode)()

    def _story(self, task: Task, column: str) -> dict[str, str]:
        """How the picture was made; of paths the last part only."""
        config = self._model.config
        generator: Any = config.generator
        references: Any = task.entry.references
        story = {
            "prompt": task.entry.prompt,
            "seed": str(task.seed),
            "run": config.name,
            "model": column,
            "generator": f"{generator.type} {getattr(generator, 'path', '')}".strip(),
            "references": ", ".join(reference.path.name for reference in references),
            "num_steps": str(num_steps(config)),
            "software": ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
        }
        is_lora = column == TUNED and self._model.is_lora
        return story | ({"strength": f"{self.strength:g}"} if is_lora else {})


def _write_sheets(tasks: Sequence[Task], columns: Sequence[str], out: Path) -> list[Path]:
    """One contact sheet for every few tasks, from the pictures as they were written."""
    sheets = []
    for first in range(0, len(tasks), _SHEET_ROWS):
        rows = tasks[first : first + _SHEET_ROWS]
        cache = PictureCache()
        examples = [complete(task.entry, cache) for task in rows]
        shown = [
            replace(e, prompt=f"{e.prompt} (seed {task.seed})")
            for e, task in zip(examples, rows, strict=True)
        ]
        pictures = {
            column: [
                _read_png(out / task.file_name(number, column))
                for number, task in enumerate(rows, start=first + 1)
            ]
            for column in columns
        }
        number = "" if len(tasks) <= _SHEET_ROWS else f"-{len(sheets) + 1:03d}"
        sheets.append(out / f"sheet{number}.png")
        save_grid(sheets[-1], shown, pictures)
    return sheets


def _read_png(path: Path) -> Tensor:
    with Image.open(path) as image:
        return Picture(path, "RGB", image.height, image.width).load()


@contextmanager
def _bar(total: int) -> Iterator[Any]:
    """A progress bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    parts = ("pictures", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*parts, console=console, disable=not sys.stderr.isatty()) as bar:
        bar.add_task("pictures", total=total)
        yield bar
