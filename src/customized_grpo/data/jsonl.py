"""Your own examples: a JSONL file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from customized_grpo.config import DataConfig
from customized_grpo.data.images import File, Picture, check_pictures
from customized_grpo.data.listed import Entry, ListedSource, Splits, check_entries
from customized_grpo.data.texts import (
    check_list,
    check_text,
    inside,
    read_objects,
    short,
)
from customized_grpo.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonlConfig(DataConfig):
    """A JSONL file, one example a line: {"prompt": ..., "references": ["a.jpg"]}.

    Optional keys: "subject" (words for it, such as "dog"), "masks" (one picture per reference,
    white where the subject is) and "id".
    """

    type: Literal["jsonl"] = "jsonl"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: str
    """Training examples."""
    held_out: str
    """Examples for evaluation, of other subjects or prompts."""
    validation: str | None = None
    """Examples for choosing a recipe (`cgrpo evaluate --split validation`)."""
    root: str | None = None
    """Folder that the pictures' paths start from and must not leave; null = the folder of the JSONL
    file."""

    def build(self, seed: int) -> ListedSource:
        """Reads the files and checks every picture they name."""
        root = None if self.root is None else Path(self.root)
        splits = Splits(
            training=read_entries(Path(self.path), root),
            held_out=read_entries(Path(self.held_out), root),
            validation=read_entries(Path(self.validation), root) if self.validation else (),
        )
        return ListedSource(splits, seed, "name a JSONL file for them")


_KEYS = {"id", "prompt", "references", "subject", "masks"}


def read_entries(path: Path, root: Path | None = None) -> Sequence[Entry]:
    """Reads a JSONL file of examples; paths start from ``root``, None: its folder.

    Raises:
        DataError: naming file, line and field of the first mistake.
    """
    root = path.parent if root is None else root
    rows = read_objects(path)
    for where, row in rows.items():
        _check_row(where, row)
    files: dict[File, str] = {}
    for where, row in rows.items():
        for key in ("references", "masks"):
            for file in _files(where, root, row, key):
                files.setdefault(file, f"{where}: {key}")
    pictures = check_pictures(files)
    entries = [_entry(where, row, root, pictures) for where, row in rows.items()]
    return check_entries(entries, str(path))


def _check_row(where: str, row: dict[str, Any]) -> None:
    if unknown := row.keys() - _KEYS:
        raise DataError(
            f"{where}: unknown key {short(min(unknown))}; known are {', '.join(sorted(_KEYS))}"
        )
    if type(row.get("id", "")) is not int and "id" in row:
        check_text(where, row, "id")
    for key in ("prompt", "subject"):
        if key in row or key == "prompt":
            check_text(where, row, key)
    for key in ("references", "masks"):
        if key in row or key == "references":
            check_list(where, row, key, "path")


def _files(where: str, root: Path, row: dict[str, Any], key: str) -> list[File]:
    mode = "L" if key == "masks" else "RGB"
    return [(inside(f"{where}: {key}", root, name), mode) for name in row.get(key, ())]


def _entry(where: str, row: dict[str, Any], root: Path, pictures: dict[File, Picture]) -> Entry:
    references = tuple(pictures[file] for file in _files(where, root, row, "references"))
    masks = tuple(pictures[file] for file in _files(where, root, row, "masks")) or None
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
