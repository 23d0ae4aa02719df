"""Contact sheets: reference | prompt | one column of pictures for each model."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from customized_grpo.files import write_atomic
from customized_grpo.types import Example

_CELL, _GAP, _HEADER, _TEXT = 144, 8, 26, 220
_LINE = 26  # height of marks and of a line of the legend
_FONT = 20  # half of it is left where a phone shows the sheet
_SMALLER = (17, 14)  # for prompts that are too long for their cell
# Of Pillow's own only ASCII is certain. The second has Europe's letters (NOTICE), the others are
# looked for where the system keeps its fonts.
_FONTS = (
    str(Path(__file__).parent / "assets" / "DejaVuSans.ttf"),
    "NotoSansCJK-Regular.ttc",
    "NotoSansArabic-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "msyh.ttc",
    "PingFang.ttc",
    "arial.ttf",
    "Arial Unicode.ttf",
)
_NONE = "\U0010fffd"  # a code that no font has


@dataclass(frozen=True, slots=True)
class Mark:
    """A word beneath a picture that says what is wrong with it; colours are as in CSS."""

    word: str
    meaning: str
    ink: str
    paper: str


Marks = Sequence[Sequence[Mark]]
"""Those of each picture of a column; none says that nothing wrong is known."""


def save_grid(
    path: Path,
    examples: Sequence[Example],
    columns: Mapping[str, Tensor | Sequence[Tensor]],
    headings: tuple[str, str] = ("reference", "prompt"),
    marks: Mapping[str, Marks] | None = None,
) -> None:
    """Writes a PNG with one row per example.

    Args:
        path: of the PNG; replaced atomically.
        examples: give reference and prompt.
        columns: heading -> images ``[len(examples), 3, H, W]`` in [0, 1], or one of any size for
            each example.
        headings: of the first two columns.
        marks: of some of the columns, by their heading; a legend explains those that occur.
    """
    marked = {name: some for name, some in (marks or {}).items() if any(some)}
    legend = list(dict.fromkeys(mark for some in marked.values() for row in some for mark in row))
    pitch = _CELL + _GAP + (_LINE if legend else 0)
    width = _GAP * (3 + len(columns)) + _CELL * (1 + len(columns)) + _TEXT
    height = _HEADER + pitch * len(examples) + (_LINE + _GAP) * len(legend)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    lefts = [_GAP, 2 * _GAP + _CELL]
    lefts += [lefts[1] + _TEXT + _GAP + i * (_CELL + _GAP) for i in range(len(columns))]
    for left, heading in zip(lefts, (*headings, *columns), strict=True):
        _write_heading(draw, left, heading, _TEXT if left == lefts[1] else _CELL + _GAP - 2)
    for row, example in enumerate(examples):
        top = _HEADER + row * pitch
        sheet.paste(_thumbnail(example.references[0]), (lefts[0], top))
        _write_prompt(draw, (lefts[1], top), example.prompt)
        for left, (name, images) in zip(lefts[2:], columns.items(), strict=True):
            sheet.paste(_thumbnail(images[row]), (left, top))
            for mark in marked[name][row] if name in marked else ():
                left = _write_mark(draw, (left, top + _CELL), mark) + 4
    for number, mark in enumerate(legend):
        top = _HEADER + pitch * len(examples) + number * (_LINE + _GAP)
        left = _write_mark(draw, (_GAP, top), mark) + _GAP
        draw.text((left, top), mark.meaning, fill="black", font=_font(_FONT, mark.meaning))
    _write(path, sheet)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _font(size: int, text: str) -> Font:
    """The first font that has all letters of a text, or Europe's where none has."""
    own = ImageFont.load_default(size)
    if text.isascii() or _has(own, text):
        return own
    fonts = (font for name in _FONTS if (font := _open_font(name, size)))
    return next((font for font in fonts if _has(font, text)), _open_font(_FONTS[0], size) or own)


@lru_cache
def _open_font(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except (OSError, ImportError):  # it is not there, or Pillow was built without FreeType
        return None


def _has(font: Font, text: str) -> bool:
    letters = {c for c in text if not c.isspace() and unicodedata.category(c)[0] not in "CM"}
    mask: Any = font.getmask
    missing = bytes(mask(_NONE))
    return all(bytes(mask(letter)) != missing for letter in letters)


def _write_heading(draw: ImageDraw.ImageDraw, left: int, heading: str, width: int) -> None:
    for size in (18, 17, 16, 15):
        font = _font(size, heading)
        if font.getlength(heading) <= width:
            break
    draw.text((left, 4), _cut(heading, font, width), fill="black", font=font)


def _write_prompt(draw: ImageDraw.ImageDraw, corner: tuple[int, int], prompt: str) -> None:
    """In the largest letters with which it fits beside the picture; what does not fit is cut."""
    prompt = unicodedata.normalize("NFC", prompt)
    for size in (_FONT, *_SMALLER):
        font = _font(size, prompt)
        lines, most = _wrap(prompt, font), _CELL // (size + 6)
        if len(lines) <= most:
            break
    if len(lines) > most:
        lines = [*lines[: most - 1], _cut(f"{lines[most - 1]}\u2026", font, _TEXT)]
    for number, line in enumerate(lines):
        place = (corner[0], corner[1] + number * (size + 6))
        draw.text(place, line, fill="black", font=font)


def _wrap(text: str, font: Font) -> list[str]:
    """Lines of at most ``_TEXT`` pixels; a word that is longer, or without blanks, is divided."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= _TEXT:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            lines += [""] if font.getlength(lines[-1] + letter) > _TEXT else []
            lines[-1] += letter
    return lines


def _cut(text: str, font: Font, width: int) -> str:
    """The text, or as much of it as fits, with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    ends = (f"{text[:end]}\u2026" for end in range(len(text) - 1, 0, -1))
    return next((end for end in ends if font.getlength(end) <= width), "")


def _write_mark(draw: ImageDraw.ImageDraw, corner: tuple[int, int], mark: Mark) -> int:
    """Returns the right end."""
    font, (left, top) = _font(_FONT, mark.word), corner
    right = left + 10 + round(font.getlength(mark.word))
    draw.rounded_rectangle((left, top + 2, right, top + _LINE), radius=4, fill=mark.paper)
    draw.text((left + 5, top + 1), mark.word, fill=mark.ink, font=font)
    return right


def save_strip(path: Path, images: Tensor) -> None:
    """Writes images ``[N, 3, H, W]`` in [0, 1] side by side, pixel for pixel, as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, to_pil(torch.cat(list(images), -1)))


def read_strip(path: Path, count: int) -> Tensor:
    """Images ``[N, 3, H, W]`` in [0, 1] of the ``count`` that ``save_strip`` wrote."""
    with Image.open(path, formats=["PNG"]) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return torch.stack(pixels.float().div(255).chunk(count, -1))


def _write(path: Path, picture: Image.Image) -> None:
    file = BytesIO()
    picture.save(file, format="PNG")  # optimised, it takes nine times as long to be 2 % smaller
    write_atomic(path, file.getvalue())


def _thumbnail(image: Tensor) -> Image.Image:
    """Fits ``[3, H, W]`` into a cell; small pictures keep crisp pixels."""
    scale = _CELL / max(image.shape[1:])
    size = tuple(max(1, round(side * scale)) for side in image.shape[1:])
    if scale >= 1:
        resized = F.interpolate(image[None].float().cpu(), size, mode="nearest-exact")[0]
    else:
        resized = F.interpolate(
            image[None].float().cpu(), size, mode="bicubic", antialias=True, align_corners=False
        )[0]
    return to_pil(resized)


def to_pil(image: Tensor) -> Image.Image:
    """An image ``[3, H, W]`` in [0, 1] in 8 bits."""
    pixels = (image.float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())


def png(image: Tensor, texts: Mapping[str, str] | None = None) -> bytes:
    """A PNG of an image ``[3, H, W]`` in [0, 1], with texts in it."""
    info = PngInfo()
    for key, text in (texts or {}).items():
        info.add_itxt(key, text.encode(errors="replace"))  # a file's name may be no UTF-8
    buffer = BytesIO()
    to_pil(image).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()
