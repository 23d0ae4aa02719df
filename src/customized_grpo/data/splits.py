"""Splits that depend on names only: the same on every machine, in every order of files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from customized_grpo.data.listed import Entry, Splits

T = TypeVar("T")


def scattered(items: Iterable[T], name: Callable[[T], str]) -> list[T]:
    """Items in an order that looks random and depends on their names only."""
    return sorted(
        items, key=lambda item: (hashlib.sha256(name(item).encode()).digest(), name(item))
    )


def scattered_entries(entries: Iterable[Entry]) -> list[Entry]:
    """Entries so that the first few show many subjects and prompts."""
    return scattered(entries, lambda entry: entry.id)


def split_by_subject(entries: Sequence[Entry], subjects: Sequence[str], share: float) -> Splits:
    """Holds out a share of the subjects, and as many others for validation, if enough remain.

    Args:
        entries: to split.
        subjects: whom each entry shows; entries of one subject stay together.
        share: of the subjects, at least one.
    """
    names = scattered(set(subjects), str)
    count = max(1, round(share * len(names)))
    part = dict.fromkeys(names[:count], "held_out")
    if len(names) > 2 * count:
        part |= dict.fromkeys(names[count : 2 * count], "validation")
    parts: dict[str, list[Entry]] = {"training": [], "held_out": [], "validation": []}
    for entry, subject in zip(entries, subjects, strict=True):
        parts[part.get(subject, "training")].append(entry)
    return Splits(
        training=parts["training"],
        held_out=scattered_entries(parts["held_out"]),
        validation=scattered_entries(parts["validation"]),
    )
