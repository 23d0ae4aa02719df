"""Aspect-ratio buckets: which size a picture of any shape is brought to, with little cropped away.

A picture belongs to the nearest of nine aspect ratios, whatever size a generator works at: pictures
of one layout share a bucket for every area and multiple. Data sources batch by layout, generators
crop and resize to ``bucket_for``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

Ratio = Literal["7:3", "16:9", "3:2", "4:3", "1:1", "3:4", "2:3", "9:16", "3:7"]
"""Width:height, as a photographer writes it."""
NAMES: tuple[Ratio, ...] = get_args(Ratio)


def sides(ratio: str) -> tuple[int, int]:
    """Height and width of a ratio's name."""
    width, height = ratio.split(":")
    return int(height), int(width)


# Height / width of common photo and film formats, flat to tall. Neighbours differ by at most 4/3:
# at most 13.4 % of a picture between 3:7 and 7:3 is cropped away.
RATIOS = tuple(height / width for height, width in map(sides, NAMES))


def nearest_ratio(height: int, width: int) -> int:
    """Index in RATIOS of the ratio that needs the least cropping."""
    ratio = math.log(height / width)
    return min(range(len(RATIOS)), key=lambda i: abs(math.log(RATIOS[i]) - ratio))


def bucket_for(height: int, width: int, area: int, multiple: int) -> tuple[int, int]:
    """Size of about ``area`` pixels for a picture of ``height`` x ``width`` pixels.

    Args:
        height: of the picture.
        width: of the picture.
        area: height x width to aim at, such as 512 * 512; the result is rounded from it.
        multiple: both sides of the result are multiples of it.

    Returns:
        Height and width; crop and resize to them with ``types.crop_and_resize``.
    """
    ratio = RATIOS[nearest_ratio(height, width)]
    sides = math.sqrt(area * ratio), math.sqrt(area / ratio)
    tall, wide = (max(1, round(side / multiple)) * multiple for side in sides)
    return tall, wide


def long_side_for(height: int, width: int, long_side: int, multiple: int) -> tuple[int, int]:
    """As ``bucket_for``, with a given long side; both sides are rounded down."""
    ratio = RATIOS[nearest_ratio(height, width)]
    sides = long_side * min(ratio, 1.0), long_side * min(1 / ratio, 1.0)
    tall, wide = (max(1, int(side + 1e-6) // multiple) * multiple for side in sides)
    return tall, wide


def layout(sizes: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """What examples of one batch must share: number and ratios of the references.

    Args:
        sizes: height and width of each reference; ``layout(r.shape[1:] for r in references)``.
    """
    return tuple(nearest_ratio(height, width) for height, width in sizes)
