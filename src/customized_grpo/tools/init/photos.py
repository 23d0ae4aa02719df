"""Are these photos good to train on? What is found is said; nothing is dropped in silence."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from customized_grpo.buckets import RATIOS, nearest_ratio
from customized_grpo.config.decoding import is_clean
from customized_grpo.data.images import check_pictures, opened, suffixes
from customized_grpo.data.photos import left_out, photos_in
from customized_grpo.data.sidecars import is_sidecar
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.pictures import to_pil
from customized_grpo.tools.init import features, measures

logger = logging.getLogger("customized_grpo")

TOO_FEW, TOO_MANY, MOST = 5, 40, 200
_WIDEST = max(RATIOS)
_SPREAD = 2.0  # between the widest and the tallest photo: two different croppings

Kind = Literal[
    "count", "unreadable", "unused", "small", "blurred", "duplicate", "odd", "shape", "transparent"
]


@dataclass(frozen=True, slots=True)
class Remark:
    """Something to know about a photo, or about all of them."""

    photo: str
    """Name of the file; '' = it is about all."""
    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.photo}: {self.text}" if self.photo else self.text


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedPhoto:
    """A photo that can be read, and what was measured of it; sizes are upright."""

    path: Path
    height: int
    width: int
    sharpness: float
    fingerprint: np.ndarray
    transparent: bool
    features: Tensor | None = None
    """Unit features ``[D]``; None: without the extra ``photo``."""

    def repeats(self, other: CheckedPhoto) -> bool:
        """Whether it shows nothing that the other does not: nearly the same picture."""
        same = measures.alike(self.fingerprint, other.fingerprint)
        return same or features.are_twins(self.features, other.features)


@dataclass(frozen=True, kw_only=True, slots=True)
class Album:
    """The photos of a folder that can be used, and what there is to say about all of them."""

    photos: tuple[CheckedPhoto, ...]
    remarks: tuple[Remark, ...]


def read_album(folder: Path, side: int, *, squares: bool = False) -> Album:
    """Reads and checks every photo of a folder.

    Args:
        folder: with the photos of one subject, no sub-folders.
        side: pixels of the pictures that the model makes.
        squares: the photos will be cropped to squares, so that their shapes do not matter.

    Raises:
        ConfigError: if it is no folder.
        DataError: if no photo in it can be used, or there are more than 200.
    """
    if not folder.is_dir():
        raise ConfigError(f"--photos must be a folder, got {str(folder)!r}; correct the path")
    paths = photos_in(folder)
    if len(paths) > MOST:
        raise DataError(
            f"--photos: {folder} must hold at most {MOST} photos of one subject, got {len(paths)}; "
            "keep the best 10 to 30"
        )
    logger.info("reading %d photos", len(paths))
    photos: list[CheckedPhoto] = []
    remarks = list(_unused(folder, set(paths)))
    encode = features.photo_encoder()
    for path in paths:
        try:
            photos.append(_inspect(path, encode))
        except DataError as error:
            name = printable(path)
            reason = str(error).replace(f": {path}", " it", 1).replace(str(path), name)
            remarks.append(Remark(name, "unreadable", reason))
    if not photos:
        found = f"; {remarks[0]}" if remarks else ""
        raise DataError(
            f"--photos: {folder} must hold photos ({', '.join(suffixes())}) that can be "
            f"read, got none{found}; put 5 to 20 photos of one subject there"
        )
    remarks += [remark for photo in photos for remark in _remarks(photo, side)]
    remarks += [
        *_duplicates(photos),
        *_odd(photos),
        *_count(len(photos)),
        *([] if squares else _shapes(photos)),
    ]
    return Album(photos=tuple(photos), remarks=tuple(remarks))


def printable(path: Path) -> str:
    """Name of a file as a terminal can show it, which must not be told to do anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in path.name)


def _inspect(path: Path, encode: features.Encode | None) -> CheckedPhoto:
    """Raises a DataError if the photo cannot be used."""
    where = "left out, as"
    if not is_clean(str(path)):
        raise DataError(f"{where} its name is not UTF-8; rename it")
    file = (path, "RGB")
    picture = check_pictures({file: where})[file]
    pixels = picture.load()
    image = to_pil(pixels)
    return CheckedPhoto(
        path=path,
        height=picture.height,
        width=picture.width,
        sharpness=measures.sharpness(image),
        fingerprint=measures.fingerprint(image),
        transparent=_is_transparent(path),
        features=None if encode is None else encode(pixels),
    )


def _is_transparent(path: Path) -> bool:
    with opened(path, str(path)) as image:
        if not image.has_transparency_data:
            return False
        lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
        return lowest < 255  # pyright: ignore[reportOperatorIssue]


def _unused(folder: Path, used: set[Path]) -> Iterator[Remark]:
    for path, why in left_out(folder, used):
        if is_sidecar(path):
            why = 'add it to train.jsonl yourself ("masks", docs/data.md)'
        yield Remark(printable(path), "unused", f"not used: {why}")


def _remarks(photo: CheckedPhoto, side: int) -> Iterator[Remark]:
    name = printable(photo.path)
    if min(photo.height, photo.width) < side:
        text = (
            f"small, {photo.width} x {photo.height} px: it will be enlarged to the model's {side} "
            "px and look soft; take the original if there is a larger one"
        )
        yield Remark(name, "small", text)
    if photo.sharpness < measures.BLURRED:
        text = (
            f"looks blurred (sharpness {photo.sharpness:.0f}, below {measures.BLURRED:.0f}): the "
            "model would learn that; leave it out or take it again"
        )
        yield Remark(name, "blurred", text)
    if photo.transparent:
        text = (
            "has a transparent background, which becomes white: fine for a few, but with such "
            "photos only the model sees the subject in no surroundings"
        )
        yield Remark(name, "transparent", text)


def _duplicates(photos: Sequence[CheckedPhoto]) -> Iterator[Remark]:
    """Names a photo once, with the first one that it repeats."""
    named: set[Path] = set()
    for one, other in combinations(photos, 2):
        if other.path not in named and one.repeats(other):
            named.add(other.path)
            text = (
                f"nearly the same picture as {printable(one.path)}: it counts double and shows "
                "nothing new; move one of the two away, then init again"
            )
            yield Remark(printable(other.path), "duplicate", text)


def _odd(photos: Sequence[CheckedPhoto]) -> Iterator[Remark]:
    """Photos that seem to show something else; none without features."""
    known = [photo.features for photo in photos if photo.features is not None]
    for row in features.odd_ones(torch.stack(known)) if known else ():
        text = "looks unlike the others: if it does not show your subject clearly, leave it out"
        yield Remark(printable(photos[row].path), "odd", text)


def _count(number: int) -> Iterator[Remark]:
    photos = f"{number} photo{'s' * (number > 1)}"
    if number < TOO_FEW:
        text = (
            f"{photos}: {TOO_FEW} to 20, from different sides and in different places, teach more; "
            "with fewer none is kept aside to judge by"
        )
        yield Remark("", "count", text)
    if number > TOO_MANY:
        text = f"{photos}: more than about 20 rarely help; keep the sharpest and most varied"
        yield Remark("", "count", text)


def _shapes(photos: Sequence[CheckedPhoto]) -> Iterator[Remark]:
    for photo in photos:
        if (ratio := max(photo.height / photo.width, photo.width / photo.height)) > _WIDEST:
            text = (
                f"very long, {ratio:.1f} : 1: its ends beyond 7 : 3 are cropped away; crop it "
                "yourself around the subject"
            )
            yield Remark(printable(photo.path), "shape", text)
    ratios = [photo.width / photo.height for photo in photos]
    if max(ratios) / min(ratios) > _SPREAD:
        count = len(Counter(nearest_ratio(photo.height, photo.width) for photo in photos))
        text = (
            f"the photos have {count} very different shapes: every update sees photos of one shape "
            "only; crop them to one shape, square is best"
        )
        yield Remark("", "shape", text)
