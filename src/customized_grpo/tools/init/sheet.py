"""`photos.png`: every photo with what there is to say about it; people rather look."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont

from customized_grpo.tools.init.photos import Album, printable

_TILE, _GAP, _COLUMNS, _LINE = 220, 16, 4, 17
_BAD, _QUIET = "#b3261e", "#555555"
_TILE_LETTERS, _LETTERS = 34, 130

Line = tuple[str, str]
"""Text and colour."""


def draw_sheet(album: Album, title: str, notes: Mapping[str, str]) -> bytes:
    """A PNG: the title, what concerns all photos, then a tile per photo.

    Args:
        album: photos, also those that cannot be read, and the remarks on them.
        title: above all.
        notes: name of a photo -> what becomes of it.
    """
    pictures = {printable(photo.path): photo.thumbnail for photo in album.photos}
    pictures |= {r.photo: None for r in album.remarks if r.kind == "unreadable"}
    rest = [str(r) for r in album.remarks if r.photo not in pictures]
    head = [(title, "black"), *_wrapped(rest, _LETTERS)]
    tiles = [
        (picture, _captions(album, name, notes.get(name))) for name, picture in pictures.items()
    ]
    rows = [tiles[first : first + _COLUMNS] for first in range(0, len(tiles), _COLUMNS)]
    heights = [_TILE + _GAP + _LINE * (1 + max(len(lines) for _, lines in row)) for row in rows]
    top = 2 * _GAP + _LINE * len(head)
    sheet = Image.new("RGB", (_GAP + _COLUMNS * (_TILE + _GAP), top + sum(heights)), "white")
    _write(sheet, _GAP, _GAP, head)
    for row, height in zip(rows, heights, strict=True):
        for column, (picture, lines) in enumerate(row):
            left = _GAP + column * (_TILE + _GAP)
            sheet.paste(_on_tile(picture, framed=len(lines) > 2), (left, top))
            _write(sheet, left, top + _TILE + 4, lines)
        top += height
    buffer = BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _captions(album: Album, name: str, note: str | None) -> list[Line]:
    remarks = [remark.text for remark in album.remarks if remark.photo == name]
    about = [] if note is None else [(note, _QUIET)]
    return [
        (_shortened(name), "black"),
        *about,
        *_wrapped(remarks, _TILE_LETTERS),
    ]


def _shortened(name: str) -> str:
    """Beginning and end, which tell apart what a phone has named."""
    half = (_TILE_LETTERS - 3) // 2
    return name if len(name) <= _TILE_LETTERS else f"{name[:half]}...{name[-half:]}"


def _wrapped(remarks: Sequence[str], letters: int) -> list[Line]:
    return [(line, _BAD) for text in remarks for line in textwrap.wrap(f"! {text}", letters)]


def _on_tile(picture: Image.Image | None, *, framed: bool) -> Image.Image:
    tile = Image.new("RGB", (_TILE, _TILE), "#e8e8e8")
    if picture is not None:
        tile.paste(picture, ((_TILE - picture.width) // 2, (_TILE - picture.height) // 2))
    if framed:
        ImageDraw.Draw(tile).rectangle((0, 0, _TILE - 1, _TILE - 1), outline=_BAD, width=4)
    return tile


def _write(sheet: Image.Image, left: int, top: int, lines: Sequence[Line]) -> None:
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (text, color) in enumerate(lines):
        draw.text((left, top + number * _LINE), text, fill=color, font=font)
