"""Contact sheets: reference | prompt | one column of pictures for each model."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from customized_grpo.files import write_atomic
from customized_grpo.types import Example

_CELL, _GAP, _HEADER, _TEXT = 144, 8, 26, 220


def save_grid(
    path: Path,
    examples: Sequence[Example],
    columns: Mapping[str, Tensor | Sequence[Tensor]],
    headings: tuple[str, str] = ("reference", "prompt"),
) -> None:
    """Writes a PNG with one row per example.

    Args:
        path: of the PNG; replaced atomically.
        examples: give reference and prompt.
        columns: heading -> images ``[len(examples), 3, H, W]`` in [0, 1], or one of any size for
            each example.
        headings: of the first two columns.
    """
    width = _GAP * (3 + len(columns)) + _CELL * (1 + len(columns)) + _TEXT
    sheet = Image.new("RGB", (width, _HEADER + (_CELL + _GAP) * len(examples)), "white")
    draw = ImageDraw.Draw(sheet)
    title, font = ImageFont.load_default(15), ImageFont.load_default(14)
    lefts = [_GAP, 2 * _GAP + _CELL]
    lefts += [lefts[1] + _TEXT + _GAP + i * (_CELL + _GAP) for i in range(len(columns))]
    for left, heading in zip(lefts, (*headings, *columns), strict=True):
        draw.text((left, 4), heading, fill="black", font=title)
    for row, example in enumerate(examples):
        top = _HEADER + row * (_CELL + _GAP)
        sheet.paste(_thumbnail(example.references[0]), (lefts[0], top))
        text = "\n".join(textwrap.wrap(example.prompt, 30))
        draw.multiline_text((lefts[1], top + 8), text, fill="black", font=font, spacing=5)
        for left, images in zip(lefts[2:], columns.values(), strict=True):
            sheet.paste(_thumbnail(images[row]), (left, top))
    _write(path, sheet)


def save_strip(path: Path, images: Tensor) -> None:
    """Writes images ``[N, 3, H, W]`` in [0, 1] side by side, pixel for pixel, as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, to_pil(torch.cat(list(images), -1)))


def _write(path: Path, picture: Image.Image) -> None:
    file = BytesIO()
    picture.save(file, format="PNG", optimize=True)
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
        info.add_itxt(key, text)
    buffer = BytesIO()
    to_pil(image).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()
