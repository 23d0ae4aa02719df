"""Several subjects in one picture: which region of an output shows which of them.

The idea is UMO's (arXiv:2509.06818): the best assignment counts, wherever the subjects are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from customized_grpo.errors import needs_extra

_SAME = 0.5  # share of two regions' union that both have, above which they are one
_NOISE = 0.25  # share of the largest part's area, below which a part of a mask is none of its own


def regions(masks: Sequence[Tensor]) -> list[Tensor]:
    """Regions ``[1, H, W]`` of a picture, of masks ``[1, H, W]`` for the words of its subjects.

    A mask's parts that do not touch are regions of their own: one subject drawn twice is two. What
    the words of two subjects find alike is one region.

    Raises:
        ConfigError: if scipy is missing.
    """
    found: list[Tensor] = []
    for mask in masks:
        for part in _parts(mask):
            if all(_overlap(part, other) <= _SAME for other in found):
                found.append(part)
    return found


def _parts(mask: Tensor) -> list[Tensor]:
    with needs_extra("report", "several subjects in one picture"):
        from scipy import ndimage
    found: Any = ndimage.label(  # typed as what it returns with `output` too
        mask[0].cpu().numpy() > 0.5, torch.ones(3, 3).numpy()
    )
    labels, count = found
    numbers = torch.from_numpy(labels).to(mask.device)
    parts = [(numbers == number).float()[None] for number in range(1, count + 1)]
    least = _NOISE * max((part.sum().item() for part in parts), default=0.0)
    return [part for part in parts if part.sum() >= least]


def _overlap(one: Tensor, other: Tensor) -> float:
    return (one * other).sum().item() / torch.maximum(one, other).sum().item()


def matched(similarities: Tensor, num_subjects: int) -> Tensor:
    """Mean similarity (0-d) of subjects and regions in the best assignment, each used once.

    A subject without a region counts as 0, and so does every region more than there are subjects.

    Args:
        similarities: of each known subject to each region ``[K, M]``, both at least 1.
        num_subjects: known or not.

    Raises:
        ConfigError: if scipy is missing.
    """
    with needs_extra("report", "several subjects in one picture"):
        from scipy.optimize import linear_sum_assignment
    rows, columns = linear_sum_assignment(similarities.cpu().double().numpy(), maximize=True)
    surplus = max(0, similarities.shape[1] - num_subjects)
    return similarities[rows, columns].sum() / (len(similarities) + surplus)
