"""Your own examples: a JSONL file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from customized_grpo.config import DataConfig
from customized_grpo.config.limits import FilePath
from customized_grpo.data.listed import Entry, ListedSource, Splits
from customized_grpo.data.rows import Row, read_rows
from customized_grpo.data.texts import (
    check_list,
    check_text,
    inside,
    read_objects,
    short,
)
from customized_grpo.errors import DataError
from customized_grpo.files import Names


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonlConfig(DataConfig):
    """A JSONL file, one example a line: {"prompt": ..., "references": ["a.jpg"]}.

    Optional keys: "subject" (words for it, such as "dog"), "masks" (one picture per reference,
    white where the subject is), "id", and, where the references show several subjects, "subjects"
    (words for that of each reference).
    """

    type: Literal["jsonl"] = "jsonl"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: FilePath
    """Training examples."""
    held_out: FilePath
    """Examples for evaluation, of other subjects or prompts."""
    validation: FilePath | None = None
    """Examples for choosing a recipe (`cgrpo evaluate --split validation`)."""
    root: FilePath | None = None
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
        files = {self.path: splits.training, self.held_out: splits.held_out}
        files |= {self.validation: splits.validation} if self.validation else {}
        remarks = [f"{path}: {count_pictures(entries)}" for path, entries in files.items()]
        return ListedSource(splits, seed, "name a JSONL file for them", remarks)


def count_pictures(entries: Sequence[Entry]) -> str:
    """How many examples there are, and of how many pictures."""
    pictures = {picture for entry in entries for picture in entry.references}
    masks = {mask for entry in entries for mask in entry.masks or ()}
    return f"{len(entries)} examples, {len(pictures)} pictures, {len(masks)} masks"


_KEYS = {"id", "prompt", "references", "subject", "subjects", "masks"}


def read_entries(path: Path, root: Path | None = None) -> Sequence[Entry]:
    """Reads a JSONL file of examples; paths start from ``root``, None: its folder.

    Raises:
        DataError: naming file, line and field of the first mistake.
    """
    folder, names = root or path.parent, Names()
    rows = [_row(where, row, folder, names) for where, row in read_objects(path).items()]
    return read_rows(rows, str(path))


def _row(where: str, row: dict[str, Any], root: Path, names: Names) -> Row:
    _check_row(where, row)
    references, masks = (
        tuple(inside(f"{where}: {key}", root, name, names) for name in row.get(key, ()))
        for key in ("references", "masks")
    )
    return Row(
        where=where,
        id=str(row.get("id", where)),
        prompt=row["prompt"].strip(),
        subject=row.get("subject", "").strip(),
        reference_subjects=tuple(words.strip() for words in row.get("subjects", ())),
        references=references,
        masks=masks,
    )


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
    for key, of in (("references", "path"), ("masks", "path"), ("subjects", "text")):
        if key in row or key == "references":
            check_list(where, row, key, of)
    for words in row.get("subjects", ()):
        check_text(where, {"subjects": words}, "subjects")
