"""Anchors of identity, without sampling: real photos, a copy of the reference, another subject.

Each anchor has one number per item, as the evaluated pictures have, so that all statistics are the
same. The anchors of a run are pictures, which its judge sees as any others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from customized_grpo.evaluation.items import BenchmarkSet, Item
from customized_grpo.evaluation.measures import Rows, identity_columns
from customized_grpo.evaluation.outcome import COPY, ORACLE, RANDOM

_Anchor = Callable[[Tensor, list[int], list[int], str], dict[str, Tensor]]
"""(similarities of all photos, references, photos of the subject, pool) -> numbers of an item."""


def identity_anchors(
    features: Tensor, wanted: BenchmarkSet, items: Sequence[Item], pool: str = "max"
) -> dict[str, dict[str, Tensor]]:
    """Anchor -> ``reference``, ``photos``, ``copy`` ``[N]``; features ``[P, D]`` of all photos.

    - oracle: a real photo of the subject other than the references, in expectation; against the
      other photos, itself left out;
    - copy: the reference itself, as all photos count it;
    - random: a photo of any other subject, in expectation.
    """
    unit = features.double()
    similarity = unit @ unit.T
    kinds = {ORACLE: _oracle, COPY: _copy, RANDOM: _random}
    return {name: _per_item(kind, similarity, wanted, items, pool) for name, kind in kinds.items()}


def _per_item(
    anchor: _Anchor, similarity: Tensor, wanted: BenchmarkSet, items: Sequence[Item], pool: str
) -> dict[str, Tensor]:
    known: dict[tuple, dict[str, Tensor]] = {}
    for item in items:
        if (item.subject, item.references) not in known:
            rows = wanted.subject_rows(item.subject)
            found = anchor(similarity, wanted.reference_rows(item), rows, pool)
            known[item.subject, item.references] = found
    values = [known[item.subject, item.references] for item in items]
    return {name: torch.stack([value[name] for value in values]) for name in values[0]}


def _expected(
    similarity: Tensor, drawn: list[int], references: list[int], photos: Rows, pool: str
) -> dict[str, Tensor]:
    """Mean over the photos that an anchor may draw, each held against ``photos`` of its own; NaN
    if there is none."""
    if not drawn:
        nothing = torch.tensor(torch.nan, dtype=torch.float64)
        return dict.fromkeys(("reference", "photos", "copy"), nothing)
    columns = identity_columns(similarity[drawn], [references] * len(drawn), photos, pool)
    return {name: column.nanmean() for name, column in columns.items()}


def _oracle(
    similarity: Tensor, references: list[int], photos: list[int], pool: str
) -> dict[str, Tensor]:
    drawn = [photo for photo in photos if photo not in references]
    others = [[other for other in photos if other != photo] for photo in drawn]
    return _expected(similarity, drawn, references, others, pool)


def _copy(
    similarity: Tensor, references: list[int], photos: list[int], pool: str
) -> dict[str, Tensor]:
    return _expected(similarity, references[:1], references, [photos], pool)


def _random(
    similarity: Tensor, references: list[int], photos: list[int], pool: str
) -> dict[str, Tensor]:
    drawn = sorted(set(range(len(similarity))) - set(photos))
    return _expected(similarity, drawn, references, [photos] * len(drawn), pool)
