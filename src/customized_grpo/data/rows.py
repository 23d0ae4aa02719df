"""Rows of a data set become entries: all their pictures are checked before a run begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from customized_grpo.data.images import CutOut, File, Picture, check_pictures
from customized_grpo.data.listed import Entry, check_entries
from customized_grpo.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """An example whose pictures are still paths."""

    where: str
    """Where it is written; opens the message of an error."""
    id: str
    prompt: str
    subject: str = ""
    """Words for the subject; '' = not known."""
    reference_subjects: tuple[str, ...] = ()
    """Words for the subject of each reference; () = not known, or all show ``subject``."""
    references: tuple[Path, ...]
    masks: tuple[Path, ...] = ()
    """One per reference, or none."""
    cut_outs: tuple[Path, ...] = ()
    """The references without their background, one per reference, or none: in place of masks."""


def read_rows(rows: Sequence[Row], source: str) -> Sequence[Entry]:
    """Entries of rows, in their order.

    Raises:
        DataError: naming the first picture or mask that cannot be used; opened by ``source`` if
            there are no rows or two have the same id.
    """
    files: dict[File, str] = {}
    for row in rows:
        for path in row.references:
            files.setdefault((path, "RGB"), f"{row.where}: references")
        for path in row.cut_outs:
            files.setdefault((path, "RGB"), f"{row.where}: cut-out")
        for path in row.masks:
            files.setdefault((path, "L"), f"{row.where}: masks")
    pictures = check_pictures(files)
    return check_entries([_entry(row, pictures) for row in rows], source)


def _entry(row: Row, pictures: dict[File, Picture]) -> Entry:
    references = tuple(pictures[path, "RGB"] for path in row.references)
    masks: tuple[Picture | CutOut, ...] = tuple(pictures[path, "L"] for path in row.masks)
    if row.cut_outs:
        shown = (pictures[path, "RGB"] for path in row.cut_outs)
        masks = tuple(map(CutOut, shown, references))
    if masks and [(m.height, m.width) for m in masks] != [(r.height, r.width) for r in references]:
        raise DataError(
            f"{row.where}: masks: must match the references in number and size, got others for "
            f"{row.references[0].name}; redraw them"
        )
    subject, subjects = named_subjects(row.where, row.subject, row.reference_subjects, references)
    return Entry(
        id=row.id,
        prompt=row.prompt,
        subject=subject,
        reference_subjects=subjects,
        references=references,
        masks=masks or None,
    )


def named_subjects(
    where: str, subject: str, each: Sequence[str], references: Sequence[object]
) -> tuple[str, tuple[str, ...]]:
    """Words for all subjects together, and for that of each reference; () if they are one.

    Raises:
        DataError: if ``each`` does not name one for every reference.
    """
    if each and len(each) != len(references):
        raise DataError(
            f"{where}: subjects: must name the subject of each reference, got {len(each)} for "
            f"{len(references)} references; name as many"
        )
    different = tuple(dict.fromkeys(each))
    together = subject or " and ".join(different)
    return together, tuple(each) if len(different) > 1 else ()
