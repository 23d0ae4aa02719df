"""Numbers of one photo, by Pillow and numpy: how sharp it is, and how like another.

Everything is measured on a reduced copy, so that the numbers of a phone's photo and of a small one
can be compared. Thresholds were chosen on DreamBench's photos; docs/own_subject.md says how they
do there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

BLURRED = 100.0
"""Sharpness below which a photo is called blurred."""
SAME_BITS = 48
"""How many of 256 bits may differ in nearly the same picture."""
SAME_COLORS = 0.95
"""Correlation of its colours."""

Array = np.ndarray[Any, Any]

_SHARPNESS_SIDE, _TILES = 512, 4
_PRINT = 16


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian in the sharpest of 4 x 4 tiles, grey values 0 to 255.

    Of a tile, since a good portrait has a blurred background; at a longest side of 512 px.
    """
    grey = image.convert("L")
    grey.thumbnail((_SHARPNESS_SIDE, _SHARPNESS_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(grey, np.float32)
    inner = pixels[1:-1, 1:-1]
    edges = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:] - 4 * inner
    tiles = [t for rows in np.array_split(edges, _TILES) for t in np.array_split(rows, _TILES, 1)]
    return max((float(tile.var()) for tile in tiles if tile.size), default=0.0)


def fingerprint(image: Image.Image) -> Array:
    """The picture in 16 x 17 colours ``[16, 17, 3]``, for ``alike``."""
    small = image.convert("RGB").resize((_PRINT + 1, _PRINT), Image.Resampling.BOX)
    return np.asarray(small, np.float32)


def alike(one: Array, other: Array) -> bool:
    """Whether two fingerprints are of nearly the same picture.

    By a difference hash, is each cell brighter than its left neighbour: saving again, scaling,
    another brightness and a slight crop move few of its bits, of unrelated photos half of them
    differ. Plain backgrounds leave it little to compare, so that the colours must agree too.
    """
    bits = [np.diff(picture.mean(2), axis=1) > 0 for picture in (one, other)]
    if int((bits[0] != bits[1]).sum()) > SAME_BITS:
        return False
    with np.errstate(invalid="ignore"):  # of a picture of one colour there is no correlation
        return bool(np.corrcoef(one.ravel(), other.ravel())[0, 1] >= SAME_COLORS)
