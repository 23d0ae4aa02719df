"""What photos show, by a network that knows photos (extra ``photo``): twins and odd ones out.

Thresholds were chosen on DreamBench's photos; docs/own_subject.md says how they do there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from customized_grpo.rewards.efficientnet_lite import EfficientNetLiteConfig, is_installed

TWIN = 0.93
"""Similarity from which two photos are of one moment: mirrored, cropped a little, or of a burst."""
ODD = 0.17
"""How much less similar to the others a photo is than they are among themselves, to be odd."""
_FEWEST = 5  # photos of which one can be odd

Encode = Callable[[Tensor], Tensor]
"""Unit features ``[D]`` of a photo ``[3, H, W]`` in [0, 1]."""


def knows_photos() -> bool:
    """Whether identity can be judged by networks that know photos, without asking the hub."""
    return is_installed("lite0") and is_installed("lite2")


def photo_encoder() -> Encode | None:
    """The network on the CPU; None where the extra is not installed."""
    if not knows_photos():
        return None
    reward = EfficientNetLiteConfig(objective="identity").build(torch.device("cpu"))
    return lambda photo: reward.embed(photo[None])[0]


def are_twins(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether features ``[D]`` are of one moment; not where they are not known."""
    return one is not None and other is not None and float(one @ other) >= TWIN


def odd_ones(features: Tensor) -> list[int]:
    """Rows of ``[P, D]`` that seem to show another subject than the others.

    A photo's mean similarity to the others against the median of theirs, which it has no part in:
    subjects differ in how alike their photos are.
    """
    count = len(features)
    if count < _FEWEST:
        return []
    similarity = (features @ features.T).fill_diagonal_(0)
    total = similarity.sum(1)
    among = (total[None] - similarity) / (count - 2)  # [i, j]: of j to all but i
    usual = among.masked_fill(torch.eye(count, dtype=torch.bool), torch.nan).nanmedian(1).values
    return (total / (count - 1) < usual - ODD).nonzero()[:, 0].tolist()
