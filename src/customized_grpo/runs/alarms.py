"""Alarms of validations: what their counts are called in a log, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

_Column = TypeVar("_Column")


class Alarm(NamedTuple):
    """One kind: an evaluator is below its best while something has risen since."""

    name: str
    rise: str
    """What has risen."""


ALARMS = {
    "hacking": Alarm("reward hacking", "a reward of its objective"),
    "copying": Alarm("copying", "the copy gap"),
}
"""By what stands before ``/EVALUATOR`` in a log, where the validations in a row are counted."""


def counts(columns: Mapping[str, _Column]) -> dict[tuple[str, str], _Column]:
    """(kind, evaluator) -> the column that counts, of all of a log."""
    parts = {name: name.partition("/") for name in columns}
    return {(kind, of): columns[n] for n, (kind, _, of) in parts.items() if kind in ALARMS}
