"""Numbers of one photo, by Pillow and numpy: how sharp, how alike, does it touch the border.

Everything is measured on a reduced copy, so that the numbers of a phone's photo and of a small one
can be compared. Thresholds were chosen on DreamBench's photos; docs/own_subject.md says how they
do there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageFilter

BLURRED = 100.0
"""Sharpness below which a photo is called blurred."""
SAME_BITS = 48
"""How many of 256 bits may differ in nearly the same picture."""
SAME_COLORS = 0.95
"""Correlation of its colours."""

Array = np.ndarray[Any, Any]
SIDES = ("left", "right", "top", "bottom")

_SHARPNESS_SIDE, _TILES = 512, 4
_PRINT = 16
_MAP_SIDE, _FRAME = 72, 3
_LEVELS = 6  # of each channel: 216 colours
_LIKELY = 0.8  # share of the middle in what middle and border have of a colour
_CONTACT = 0.2  # of a side


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian in the sharpest of 4 x 4 tiles, grey values 0 to 255.

    Of a tile, since a good portrait has a blurred background; at a longest side of 512 px.
    """
    grey = _reduced(image, _SHARPNESS_SIDE).convert("L")
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
    return int((bits[0] != bits[1]).sum()) <= SAME_BITS and _correlation(one, other) >= SAME_COLORS


def _correlation(one: Array, other: Array) -> float:
    """Of two pictures with themselves 1, of pictures of one colour 0."""
    a, b = one - one.mean(), other - other.mean()
    norm = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / norm if norm else 0.0


def touched_sides(image: Image.Image) -> tuple[str, ...]:
    """Sides at which the subject seems to be cut off. A guess by colour, no detector.

    Of a side: colours that are at least four times as frequent in the middle of the photo as along
    the other three sides are taken for the subject's. Where the area of such colours that begins in
    the middle reaches a fifth of the side, the subject seems to go on beyond it.
    """
    small = _reduced(image.filter(ImageFilter.BoxBlur(2)), _MAP_SIDE)
    colors: Array = (np.asarray(small).astype(int) * _LEVELS // 256) @ (_LEVELS**2, _LEVELS, 1)
    middle = _middle(colors.shape)
    inside = _frequencies(colors[middle])
    strips = (colors[:, :_FRAME], colors[:, -_FRAME:], colors[:_FRAME], colors[-_FRAME:])
    touched = []
    for number, side in enumerate(SIDES):
        others = [strip.ravel() for n, strip in enumerate(strips) if n != number]
        outside = _frequencies(np.concatenate(others))
        likely = (inside / (inside + outside + 1e-9))[colors] > _LIKELY
        subject = _connected(likely, likely & middle)
        edges = (subject[:, 0], subject[:, -1], subject[0], subject[-1])
        if edges[number].mean() >= _CONTACT:
            touched.append(side)
    return tuple(touched)


def _reduced(image: Image.Image, side: int) -> Image.Image:
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.BOX)
    return small


def _middle(shape: tuple[int, ...]) -> Array:
    """An ellipse of half the height and width."""
    y, x = (np.linspace(-1, 1, size) for size in shape)
    return y[:, None] ** 2 + x**2 < 0.25


def _frequencies(colors: Array) -> Array:
    """Shares of the colours ``[LEVELS^3]``, each with a part of its neighbours': few pixels say
    little about one exact colour."""
    counts = np.bincount(colors, minlength=_LEVELS**3).astype(float)
    cube = np.pad(counts.reshape(_LEVELS, _LEVELS, _LEVELS), 1)
    for axis in range(3):
        cube = (np.roll(cube, 1, axis) + 2 * cube + np.roll(cube, -1, axis)) / 4
    smooth = cube[1:-1, 1:-1, 1:-1].ravel()
    return smooth / (smooth.sum() or 1)  # a very long photo has no middle


def _connected(area: Array, seed: Array) -> Array:
    """What of an area can be reached from a part of it."""
    while True:
        padded = np.pad(seed, 1)
        around = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
        grown = (seed | around) & area
        if (grown == seed).all():
            return seed
        seed = grown
