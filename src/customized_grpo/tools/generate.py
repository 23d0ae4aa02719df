"""Pictures of your own prompts and references: by the base, and by what was trained of it.

A picture depends on its seed, prompt and references alone: its noise is drawn from its own seed, so
that it is the same in any batch, up to the rounding of the device.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from customized_grpo.config import RunConfig, load_config
from customized_grpo.config.names import BASE
from customized_grpo.config.text_limits import unknown_words
from customized_grpo.data.images import File, Picture, check_pictures
from customized_grpo.data.jsonl import read_entries
from customized_grpo.data.listed import Entry, PictureCache, complete, outline
from customized_grpo.data.overview import read_in_part
from customized_grpo.data.texts import check_text
from customized_grpo.devices import memory_named, pick_device
from customized_grpo.errors import CheckpointError, ConfigError
from customized_grpo.files import write_atomic
from customized_grpo.generators.base import Generator, Sizable
from customized_grpo.generators.cache import CachedEncoder
from customized_grpo.generators.lora import set_strength
from customized_grpo.generators.lora_files import holds_lora, lora_file
from customized_grpo.pictures import png, read_strip, save_grid
from customized_grpo.runs.files import CONFIG
from customized_grpo.runs.progress import working
from customized_grpo.runs.run import Run
from customized_grpo.training.build import build_generator, load_trained
from customized_grpo.training.sampling import FixedSampler
from customized_grpo.types import Example

logger = logging.getLogger("customized_grpo")

TUNED = "tuned"
_SHEET_ROWS = 25
LESS_MEMORY = "set generator.offload, generator.dtype or generator.quantization in the config"
_PACKAGES = ("customized-grpo", "torch", "diffusers", "transformers", "peft")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What TARGET of a command names: a config, and weights that were trained by it."""

    config: RunConfig
    """As it is evaluated."""
    weights: Path | None = None
    """Folder of trained weights, or the file of a LoRA; None: there is the base only."""

    @property
    def is_lora(self) -> bool:
        """Whether the weights are a LoRA, whose strength can be chosen."""
        return self.weights is not None and holds_lora(self.weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shot:
    """A picture to make: prompt and references, and the seed of its noise."""

    entry: Entry
    seed: int

    def file_name(self, number: int, column: str) -> str:
        """``number`` counts the pictures of a column from 1."""
        words = re.sub(r"[^a-z0-9]+", "-", self.entry.prompt.lower())[:40].strip("-")
        parts = [f"{number:04d}", words, f"seed{self.seed}", column]
        return "-".join(part for part in parts if part) + ".png"


def open_target(target: Path, lora: Path | None = None) -> Target:
    """Opens the folder of a run, or a config file and ``--lora``.

    Raises:
        CheckpointError: if the folder is no run with weights, or ``lora`` holds none.
        ConfigError: if the config is not valid, or both name weights.
    """
    if target.is_dir():
        if lora is not None:
            raise ConfigError(
                f"--lora must be left out with the folder of a run, which has weights of its own, "
                f"got {str(lora)!r}; give {target / CONFIG} as TARGET"
            )
        run = Run.open(target)
        return Target(config=run.config.evaluated(), weights=run.weights)
    if not target.exists():
        raise CheckpointError(
            f"TARGET must be the folder of a run or a config file, got {str(target)!r}, which is "
            "not there; check the path, or train first: `cgrpo train CONFIG`"
        )
    if lora is not None and not (lora / "transformer").is_dir():
        lora = lora_file(lora, "--lora: ")
    return Target(config=load_config(target).evaluated(), weights=lora)


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
    target: Target,
    shots: Sequence[Shot],
    out: Path,
    *,
    base: bool = True,
    strength: float | None = None,
    batch_size: int | None = None,
    size: tuple[int, int] | None = None,
    metadata: bool = True,
) -> list[Path]:
    """Writes a PNG of every shot by every model into ``out``; returns the contact sheets.

    Args:
        target: the generator, and the weights that were trained.
        shots: what the pictures shall show.
        out: a new or empty folder; pictures appear in it as they are made.
        base: whether the base makes them too, beside the trained weights.
        strength: of the LoRA; None: 1.
        batch_size: pictures made together; None: the config's ``evaluation.batch_size``.
        size: height and width of the pictures; None: as the config says.
        metadata: whether a PNG says how it was made.

    Raises:
        ConfigError: if an option has no effect on this target, or ``out`` holds something.
        DataError: if the generator cannot take the references.
    """
    columns = [*([BASE] if base else []), *([TUNED] if target.weights else [])]
    _check(target, columns, strength, out)
    config, generator = _build(target.config, size)
    for shot in shots:
        generator.check(outline(shot.entry))
    for line in prompt_remarks(config, [shot.entry.prompt for shot in shots]):
        logger.warning(line)
    out.mkdir(parents=True, exist_ok=True)
    together = batch_size or config.evaluation.batch_size
    config = replace(config, evaluation=replace(config.evaluation, batch_size=together))
    encode, pictures = CachedEncoder(generator, config.generator, config.cache), PictureCache()

    def draw(batch: Sequence[Shot]) -> Tensor:
        examples = [complete(shot.entry, pictures) for shot in batch]
        return seeded_sampler(generator, config, examples, [shot.seed for shot in batch], encode)()

    strength = 1.0 if strength is None else strength
    memory = memory_named(f"--batch-size, or {LESS_MEMORY}")
    with working("pictures", len(shots) * len(columns)) as advance, memory:
        for column in columns:
            if column == TUNED:
                assert target.weights is not None  # or there is no such column
                load_trained(generator, target.weights, target.config.mixed_precision)
                if target.is_lora:
                    set_strength(generator.transformer, strength)
            story = _story(target, column, strength)
            for first in range(0, len(shots), together):
                batch = shots[first : first + together]
                for number, (shot, image) in enumerate(zip(batch, draw(batch), strict=True), 1):
                    texts = story | _story_of(shot) if metadata else None
                    write_atomic(out / shot.file_name(first + number, column), png(image, texts))
                    advance()
    return _write_sheets(shots, columns, out)


def prompt_remarks(config: RunConfig, prompts: Sequence[str]) -> list[str]:
    """What the generator does not know, or does not read to its end."""
    unknown = unknown_words(getattr(config.generator, "path", ""), prompts)
    return [*filter(None, [unknown]), *read_in_part({"generator": config.generator}, prompts)]


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


def _build(config: RunConfig, size: tuple[int, int] | None) -> tuple[RunConfig, Generator]:
    """The generator, and the config of it as it is."""
    generator = build_generator(config, pick_device(config.device))
    if size is None:
        return config, generator
    if not isinstance(generator, Sizable):
        raise ConfigError(
            f"--size must be left out for generator {config.generator.type}, whose pictures have "
            f"one size, got {size[1]}x{size[0]}"
        )
    try:
        generator = generator.sized(*size)
    except ConfigError as error:
        raise ConfigError(f"--size: {error}") from error
    plug: Any = config.generator
    return replace(config, generator=replace(plug, height=size[0], width=size[1])), generator


def _check(target: Target, columns: Sequence[str], strength: float | None, out: Path) -> None:
    if not columns:
        raise ConfigError("--no-base must be left out where TARGET has no weights; add --lora")
    if strength is not None and not math.isfinite(strength):
        raise ConfigError(f"--strength must be a finite number, got {strength}; 1 = as trained")
    if strength is not None and not target.is_lora:
        raise ConfigError(f"--strength must be left out where there is no LoRA, got {strength}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out must be a new or empty folder, got {str(out)!r}; name another")


def _story(target: Target, column: str, strength: float) -> dict[str, str]:
    """How all pictures of a column were made, for their PNGs."""
    config, generator = target.config, cast(Any, target.config.generator)
    story = {
        "run": config.name,
        "model": column,
        "generator": f"{generator.type} {getattr(generator, 'path', '')}".strip(),
        "num_steps": str(num_steps(config)),
        "software": ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
    }
    is_lora = column == TUNED and target.is_lora
    return story | ({"strength": f"{strength:g}"} if is_lora else {})


def _story_of(shot: Shot) -> dict[str, str]:
    references = ", ".join(cast(Picture, picture).path.name for picture in shot.entry.references)
    return {"prompt": shot.entry.prompt, "seed": str(shot.seed), "references": references}


def _write_sheets(shots: Sequence[Shot], columns: Sequence[str], out: Path) -> list[Path]:
    """Writes a contact sheet for every few shots, from the pictures as they were written."""
    sheets = []
    for first in range(0, len(shots), _SHEET_ROWS):
        rows = shots[first : first + _SHEET_ROWS]
        cache = PictureCache()
        examples = [
            replace(complete(shot.entry, cache), prompt=f"{shot.entry.prompt} (seed {shot.seed})")
            for shot in rows
        ]
        pictures = {
            column: [
                read_strip(out / shot.file_name(number, column), 1)[0]
                for number, shot in enumerate(rows, first + 1)
            ]
            for column in columns
        }
        number = "" if len(shots) <= _SHEET_ROWS else f"-{len(sheets) + 1:03d}"
        sheets.append(out / f"sheet{number}.png")
        save_grid(sheets[-1], examples, pictures)
    return sheets
