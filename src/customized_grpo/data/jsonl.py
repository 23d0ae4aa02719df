"""Your own examples: a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from customized_grpo.config import DataConfig
from customized_grpo.data.images import File, Picture, check_pictures
from customized_grpo.data.listed import Entry, ListedSource, Splits, check_entries
from customized_grpo.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonlConfig(DataConfig):
    """A JSONL file, one example a line: {"prompt": ..., "references": ["a.jpg"]}.

    Optional keys: "subject" (words for it, such as "dog"), "masks" (one picture per reference,
    white where the subject is) and "id". Paths are relative to the file's folder.
    """

    type: Literal["jsonl"] = "jsonl"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: str
    """Training examples."""
    held_out: str
    """Examples for evaluation, of other subjects or prompts."""
    validation: str | None = None
    """Examples for choosing a recipe (`cgrpo evaluate --split validation`)."""

    def build(self, seed: int) -> ListedSource:
        """Reads the files and checks every picture they name."""
        splits = Splits(
            training=read_entries(Path(self.path)),
            held_out=read_entries(Path(self.held_out)),
            validation=read_entries(Path(self.validation)) if self.validation else (),
        )
        return ListedSource(splits, seed, "name a JSONL file for them")


_KEYS = {"id", "prompt", "references", "subject", "masks"}


def read_entries(path: Path) -> Sequence[Entry]:
    """Reads a JSONL file of examples.

    Raises:
        DataError: naming file, line and field of the first mistake.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    rows = {
        f"{path}:{number}": parse_object(f"{path}:{number}", line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    }
    for where, row in rows.items():
        _check_row(where, row)
    files: dict[File, str] = {}
    for where, row in rows.items():
        for key in ("references", "masks"):
            for file in _files(path.parent, row, key):
                files.setdefault(file, f"{where}: {key}")
    pictures = check_pictures(files)
    entries = [_entry(where, row, path.parent, pictures) for where, row in rows.items()]
    return check_entries(entries, str(path))


def parse_object(where: str, text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: if the text is none.
    """
    try:
        row: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be an object, got {type(row).__name__}")
    return row


def _check_row(where: str, row: dict[str, Any]) -> None:
    if unknown := row.keys() - _KEYS:
        raise DataError(
            f"{where}: unknown key {min(unknown)!r}; known are {', '.join(sorted(_KEYS))}"
        )
    for key in ("prompt", "subject"):
        if key in row or key == "prompt":
            check_text(where, row, key)
    for key in ("references", "masks"):
        if key in row or key == "references":
            check_paths(where, row, key)


def check_text(where: str, row: dict[str, Any], key: str) -> str:
    """A string with something in it, without spaces around it.

    Raises:
        DataError: if it is none.
    """
    if not isinstance(row.get(key), str) or not row[key].strip():
        raise DataError(f"{where}: {key}: must be a non-empty string, got {row.get(key)!r}")
    return row[key].strip()


def check_paths(where: str, row: dict[str, Any], key: str) -> list[str]:
    """A list of at least one path.

    Raises:
        DataError: if it is none.
    """
    names = row.get(key)
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise DataError(f"{where}: {key}: must be a list of at least one path, got {names!r}")
    return names


def _files(folder: Path, row: dict[str, Any], key: str) -> list[File]:
    return [(folder / name, "L" if key == "masks" else "RGB") for name in row.get(key, ())]


def _entry(where: str, row: dict[str, Any], folder: Path, pictures: dict[File, Picture]) -> Entry:
    references = tuple(pictures[file] for file in _files(folder, row, "references"))
    masks = tuple(pictures[file] for file in _files(folder, row, "masks")) or None
    check_masks(where, references, masks)
    return Entry(
        id=str(row.get("id", where)),
        prompt=row["prompt"].strip(),
        references=references,
        masks=masks,
        subject=row.get("subject", "").strip(),
    )


def check_masks(where: str, references: Sequence[Picture], masks: Sequence[Picture] | None) -> None:
    """Raises a DataError if the masks do not lie on the references."""
    if masks is None:
        return
    if [(m.height, m.width) for m in masks] != [(r.height, r.width) for r in references]:
        raise DataError(f"{where}: masks: must match the references in number and size")
