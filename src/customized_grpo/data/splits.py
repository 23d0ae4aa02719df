"""Splits that depend on names only: the same on every machine, in every order of files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import TypeVar

from customized_grpo.data.listed import Entry, Splits

T = TypeVar("T")


def scattered(items: Iterable[T], name: Callable[[T], str]) -> list[T]:
    """Items in an order that looks random and depends on their names only."""
    return sorted(
        items, key=lambda item: (hashlib.sha256(name(item).encode()).digest(), name(item))
    )


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
    return sort_into_splits(entries, [part.get(subject, "training") for subject in subjects])


def sort_into_splits(entries: Sequence[Entry], parts: Sequence[str]) -> Splits:
    """Splits of entries, given the name of each one's; the first few held out show many things."""

    def of(name: str) -> list[Entry]:
        return [entry for entry, part in zip(entries, parts, strict=True) if part == name]

    return Splits(
        training=of("training"),
        held_out=scattered(of("held_out"), attrgetter("id")),
        validation=scattered(of("validation"), attrgetter("id")),
    )
