"""What is measured, as pure functions of features and scores.

Axes: N pictures (items), P photos, D features. Every function gives one number per picture, NaN
where it does not apply; means over pictures and their intervals are taken in ``statistics``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

Rows = Sequence[Sequence[int]]
"""Places of photos, a list for every picture."""


def identity_columns(
    similarity: Tensor, references: Rows, photos: Rows, pool: str = "max"
) -> dict[str, Tensor]:
    """Identity of pictures by their similarities ``[N, P]`` to all photos of the benchmark.

    - ``reference``: to the photo it is conditioned on; of several, the most similar (``pool`` max)
      or their mean;
    - ``photos``: mean over *all* real photos of the subject;
    - ``copy``: ``reference`` less the mean over the subject's other photos: what is more similar
      to the one photo that was shown than to the subject. NaN where there is no other.
    """
    shown = [_row(similarity, n, rows) for n, rows in enumerate(references)]
    reference = torch.stack([_pooled(values, pool) for values in shown])
    others = [sorted(set(all_) - set(some)) for some, all_ in zip(references, photos, strict=True)]
    return {
        "reference": reference,
        "photos": _means(similarity, photos),
        "copy": reference - _means(similarity, others),
    }


def _row(similarity: Tensor, n: int, rows: Sequence[int]) -> Tensor:
    return similarity[n, torch.tensor(rows, dtype=torch.int64)]


def _means(similarity: Tensor, places: Rows) -> Tensor:
    """Mean over the given photos of each picture; NaN entries are left out."""
    return torch.stack([_row(similarity, n, rows).nanmean() for n, rows in enumerate(places)])


def _pooled(values: Tensor, pool: str) -> Tensor:
    if pool == "mean":
        return values.nanmean()
    known = values[~values.isnan()]
    return known.max() if len(known) else values.new_tensor(torch.nan)


def diversity_column(features: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """Mean ``1 - cosine`` of a picture to the others of its group; features ``[N, D]`` are unit.

    The mean over a group's pictures is the mean over its pairs. NaN where a group is one picture.
    """
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    column = torch.full((len(features),), torch.nan, dtype=torch.float64)
    for rows in members.values():
        if len(rows) > 1:
            some = features[rows].double()
            distance = 1 - some @ some.T
            column[rows] = (distance.sum(1) - distance.diagonal()) / (len(rows) - 1)
    return column


def joint_columns(
    scores: Mapping[str, Tensor], baseline: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Whether a picture is better, and worse, than the baseline's on *every* objective.

    Their means are the joint domination and joint collapse rates (arXiv:2605.13155). Pictures that
    lack a score count in neither.
    """
    own = torch.stack([scores[name] for name in scores], 1)
    other = torch.stack([baseline[name] for name in scores], 1)
    known = ~(own - other).isnan().any(1)

    def rate(flags: Tensor) -> Tensor:
        return torch.where(known, flags.all(1).double(), torch.nan)

    return {"joint/domination": rate(own > other), "joint/collapse": rate(own < other)}


def other_prompts(prompts: Sequence[tuple[str, str]]) -> list[str]:
    """For each (subject, prompt) the next other prompt of the subject, or else of the benchmark.

    A picture that follows its prompt scores lower under it; one that ignores it does not.
    Where there is one prompt only, it stands for itself.
    """
    of: dict[str, list[str]] = {}
    for subject, prompt in prompts:
        if prompt not in of.setdefault(subject, []):
            of[subject].append(prompt)
    everything = list(dict.fromkeys(prompt for _, prompt in prompts))
    other: list[str] = []
    for subject, prompt in prompts:
        pool = of[subject] if len(of[subject]) > 1 else everything
        other.append(pool[(pool.index(prompt) + 1) % len(pool)])
    return other
