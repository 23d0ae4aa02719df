"""Reading pictures of any common kind, upright and in 8 bits; broken ones are named.

What becomes what: EXIF rotation is applied; transparency lies on white (in a mask: on black); CMYK,
palettes, grey and 16 bits per channel become 8-bit RGB; of an animation the first frame counts;
pictures above 1024 x 1024 pixels are reduced to that area. Colour profiles are not applied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from customized_grpo.assets import one_line
from customized_grpo.errors import DataError

MIN_SIDE = 32
MAX_PIXELS = 89_478_485  # Pillow's own threshold: a file that claims more may be a bomb
KEPT_PIXELS = 1024 * 1024  # the largest area that the generators work at

Mode = Literal["RGB", "L"]
File = tuple[Path, Mode]
_SAME = 8 / 255  # difference of a channel that an encoder may leave between equal pixels
_ROTATED = (5, 6, 7, 8)  # values of the EXIF orientation that swap height and width
_ORIENTATION = 0x0112
_TURNS = {  # its values
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Not all that Pillow reads: for some formats (EPS) it would start a program on the file.
_HEIC = re.compile(rb"hei[cxms]|hev[cxms]|mif1|msf1")  # brands of the container
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
HEIC_SUFFIXES = (".heic", ".heif", ".hif")


@lru_cache
def reads_heic() -> bool:
    """Whether HEIC is read as the other formats are: where pillow-heif is, the extra [heic]."""
    try:
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    register_heif_opener()
    return True


def suffixes() -> tuple[str, ...]:
    """Endings of the names of pictures that can be read, in lower case."""
    return (*_SUFFIXES, *HEIC_SUFFIXES) if reads_heic() else _SUFFIXES


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture on disk that has been checked; its pixels are read when they are needed."""

    path: Path
    mode: Mode
    """RGB, or L for a mask."""
    height: int
    """Upright and as loaded, which is what the examples have."""
    width: int

    def load(self) -> Tensor:
        """Pixels ``[3, H, W]`` (a mask: ``[1, H, W]``) float32 in [0, 1].

        Raises:
            DataError: if the file has changed and cannot be read any more.
        """
        with opened(self.path, str(self.path)) as image:
            return to_tensor(upright(image, self.mode, str(self.path)))


@dataclass(frozen=True, slots=True)
class CutOut:
    """The mask of a subject that was cut out of a picture: an own picture without its background.

    The subject is where that has no transparency, or, where it has none at all, where it shows
    what the whole picture shows; a picture in shades of grey is the mask itself.
    """

    picture: Picture
    whole: Picture

    @property
    def height(self) -> int:
        """See Picture."""
        return self.picture.height

    @property
    def width(self) -> int:
        """See Picture."""
        return self.picture.width

    def load(self) -> Tensor:
        """Mask ``[1, H, W]`` float32 in [0, 1].

        Raises:
            DataError: if a file has changed and cannot be read any more.
        """
        path = str(self.picture.path)
        with opened(self.picture.path, path) as image:
            grey = image.mode in ("1", "L") or bits_of_16(image, path)
            if not grey and (alpha := alpha_of(image, path)):
                return to_tensor(alpha)
            if grey or image.mode == "LA":
                return to_tensor(upright(image, "L", path))
            shown = to_tensor(upright(image, "RGB", path))
        return ((shown - self.whole.load()).abs().amax(0, keepdim=True) < _SAME).float()


def check_pictures(files: Mapping[File, str]) -> dict[File, Picture]:
    """Opens every picture and reads it to its end, on all cores; the pixels are not kept.

    Args:
        files: path and mode -> where the picture is named, which opens the message of an error.

    Raises:
        DataError: naming the first picture that is missing, broken, too small or too large.
    """
    with ThreadPoolExecutor() as pool:
        checked = pool.map(_check, files.keys(), files.values())
        return dict(zip(files, checked, strict=True))


def _check(file: File, where: str) -> Picture:
    path, mode = file
    return Picture(path, mode, *size_of(path, mode, f"{where}: {path}"))


def size_of(file: Path | IO[bytes], mode: Mode, where: str) -> tuple[int, int]:
    """Height and width of a picture, upright and as loaded, which is read to its end.

    Raises:
        DataError: opening with ``where``, if it cannot be used.
    """
    with opened(file, where) as image:
        width, height = image.size
        bits_of_16(image, where)
        with _decoding(where):
            image.draft(None, (1, 1))  # a JPEG is read in full, but at an eighth of its size
            image.load()
            if mode == "RGB":
                _check_range(image, where)
            if image.getexif().get(_ORIENTATION) in _ROTATED:
                width, height = height, width
    return kept_size(height, width)


def _check_range(image: Image.Image, where: str) -> None:
    """Cameras and scanners write 10 or 12 bits into 16, which would come out nearly black.

    Raises:
        DataError: if no value is as large as 16 bits make it.
    """
    if bits_of_16(image, where) and 0 < (most := int(np.asarray(image).max())) < 2**12:
        raise DataError(
            f"{where} must use its 16 bits, got at most {most} of 65,535, which is nearly black; "
            "save it as an 8-bit PNG, brightened"
        )


def _beside(file: Path) -> str:
    """Names of a few pictures in the folder of one that is missing."""
    names: list[str] = []
    with suppress(OSError):
        some = islice(file.parent.iterdir(), 1000)  # of a data set there may be millions
        names = sorted(other.name for other in some if other.suffix.lower() in suffixes())
    return f"; its folder has {', '.join(names[:5])}{', ...' * (len(names) > 5)}" if names else ""


def opened(file: Path | IO[bytes], where: str) -> Image.Image:
    """A picture whose header is read and whose size is within bounds; to be used in a ``with``.

    Raises:
        DataError: opening with ``where``.
    """
    with _decoding(where):
        if isinstance(file, Path) and not file.exists():
            raise DataError(
                f"{where} is not a readable picture: it is not there; check the path{_beside(file)}"
            )
        if isinstance(file, Path) and not file.is_file():
            raise DataError(f"{where} must be a file, got a folder, a pipe or a device")
        try:
            image = Image.open(file, formats=(*_FORMATS, "HEIF") if reads_heic() else _FORMATS)
        except UnidentifiedImageError as error:
            if isinstance(file, Path) and (kind := _kind(file)):
                fix = "save it as JPEG or PNG"
                raise DataError(f"{where} is {kind}, whatever its name says; {fix}") from error
            raise
    width, height = image.size
    if min(width, height) < MIN_SIDE or width * height > MAX_PIXELS:
        image.close()
        raise DataError(
            f"{where} must be at least {MIN_SIDE} px on each side and have at most {MAX_PIXELS:,} "
            f"pixels, got {width} x {height}; scale it or leave it out"
        )
    return image


def _kind(file: Path) -> str | None:
    """What a file that is no picture to be read here is, by its first bytes; None: not known."""
    with file.open("rb") as opened_file:
        head = opened_file.read(64)
    if not head:
        return "empty"
    if head[4:8] == b"ftyp":
        why = "that cannot be decoded" if reads_heic() else "and needs the extra [heic]"
        return f"HEIC {why}" if _HEIC.search(head[8:]) else "a film"
    kinds = ((b"%PDF", "a PDF"), (b"8BPS", "Photoshop's own format"), (b"<svg", "a drawing (SVG)"))
    return next((kind for start, kind in kinds if head.startswith(start)), None)


def upright(image: Image.Image, mode: Mode, where: str) -> Image.Image:
    """The picture as a person sees it, in ``mode``.

    Raises:
        DataError: if it cannot be decoded, or its channels have neither 8 nor 16 bits.
    """
    background = "white" if mode == "RGB" else "black"
    with _decoding(where):
        image = _turned(image)
        if bits_of_16(image, where):
            shades = np.asarray(image).astype(np.float32) / 257
            image = Image.fromarray(shades.round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        return image.convert(mode)


def alpha_of(image: Image.Image, where: str) -> Image.Image | None:
    """How opaque a picture is, upright and in 8 bits; None: everywhere, whatever channels it has.

    Raises:
        DataError: if it cannot be decoded.
    """
    if not image.has_transparency_data:
        return None
    with _decoding(where):
        alpha = _turned(image).convert("RGBA").getchannel("A")
    return alpha if alpha.getextrema() != (255, 255) else None


def _turned(image: Image.Image) -> Image.Image:
    """As its EXIF data say. Pillow's exif_transpose also writes them anew, which fails where one
    is not of the type that it should have."""
    image.load()  # by which Pillow turns a TIFF itself
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def _decoding(where: str) -> AbstractContextManager[None]:
    """One line for whatever Pillow's decoders raise on damaged bytes, which is almost anything."""
    return one_line(f"{where} is not a readable picture", DataError)


def bits_of_16(image: Image.Image, where: str) -> bool:
    """Whether the one channel has 16 bits, which Pillow would clip instead of scale.

    Raises:
        DataError: if it has 32, whose range of values is not known.
    """
    if image.mode in ("I", "F"):
        raise DataError(
            f"{where} must have 8 or 16 bits per channel, got 32 (mode {image.mode}); save it as "
            "an 8-bit PNG"
        )
    return image.mode.startswith("I;16")


def to_tensor(image: Image.Image) -> Tensor:
    """Pixels ``[C, H, W]`` float32 in [0, 1] of an RGB or L picture, of at most KEPT_PIXELS."""
    height, width = kept_size(image.height, image.width)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return pixels[None] if image.mode == "L" else pixels.permute(2, 0, 1).contiguous()


def kept_size(height: int, width: int) -> tuple[int, int]:
    """Height and width as loaded: the same, or reduced to an area of KEPT_PIXELS."""
    scale = min(1.0, math.sqrt(KEPT_PIXELS / (height * width)))
    return max(1, round(height * scale)), max(1, round(width * scale))
