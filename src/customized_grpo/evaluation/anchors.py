"""Anchors of identity, without sampling: real photos, a copy of the reference, another subject.

Each anchor has one number per item, as the evaluated pictures have, so that all statistics are the
same. The anchors of a run are pictures, which its judge sees as any others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from customized_grpo.config.names import COPY, ORACLE, RANDOM
from customized_grpo.evaluation.items import BenchmarkSet, Item
from customized_grpo.evaluation.measures import identity_columns


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
    anchors: dict[str, dict[str, Tensor]] = {}
    keys = [(item.subject, item.references) for item in items]
    shown = {
        key: (wanted.reference_rows(item), wanted.subject_rows(item.subject))
        for key, item in dict(zip(keys, items, strict=True)).items()
    }
    for name in (ORACLE, COPY, RANDOM):
        numbers = {key: _expected(name, similarity, *rows, pool) for key, rows in shown.items()}
        anchors[name] = {
            column: torch.stack([numbers[key][column] for key in keys])
            for column in ("reference", "photos", "copy")
        }
    return anchors


def _expected(
    anchor: str, similarity: Tensor, references: list[int], photos: list[int], pool: str
) -> dict[str, Tensor]:
    """Mean over the photos that an anchor may draw; NaN if there is none."""
    drawn = {
        ORACLE: [photo for photo in photos if photo not in references],
        COPY: references[:1],
        RANDOM: [photo for photo in range(len(similarity)) if photo not in photos],
    }[anchor]
    if not drawn:
        nothing = torch.tensor(torch.nan, dtype=torch.float64)
        return dict.fromkeys(("reference", "photos", "copy"), nothing)
    against = [[p for p in photos if p != own or anchor == COPY] for own in drawn]
    columns = identity_columns(similarity[drawn], [references] * len(drawn), against, pool)
    return {name: column.nanmean() for name, column in columns.items()}
