"""Pictures and masks of every format, damaged: pixels of the announced size, or one line."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from fuzzing import break_bytes, examples, planted, refused_or
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageSequence
from torch import Tensor

from customized_grpo.data.images import MAX_PIXELS, Picture, check_pictures
from customized_grpo.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # of what they guess, or cannot read
Mode = Literal["RGB", "L"]

SIDES = [0, 1, 31, 32, 40, 9_459, 9_460, 16_383, 65_535, 10**5, 2**31 - 1, 2**31, 2**32 - 1]


def noise(mode: str, size: tuple[int, int] = (40, 36)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return picture if mode == "RGBA" else picture.convert(mode)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


ANIMATED = {"save_all": True, "append_images": [noise("RGB").rotate(9)] * 2}
ORIGINALS: dict[str, bytes] = {
    **{f"png {m}": encoded(noise(m), "PNG") for m in ("RGB", "RGBA", "P", "L", "1", "I;16", "LA")},
    "png transparent": encoded(noise("P"), "PNG", transparency=3),
    "png turned": encoded(noise("RGB"), "PNG", exif=with_orientation(6)),
    "png animated": encoded(noise("RGB"), "PNG", **ANIMATED),
    **{f"jpeg {m}": encoded(noise(m), "JPEG") for m in ("RGB", "L", "CMYK")},
    "jpeg progressive": encoded(noise("RGB"), "JPEG", progressive=True, exif=with_orientation(8)),
    "mpo": encoded(noise("RGB"), "MPO", **ANIMATED),
    "webp": encoded(noise("RGB"), "WEBP"),
    "webp lossless": encoded(noise("RGBA"), "WEBP", lossless=True, exif=with_orientation(5)),
    "webp animated": encoded(noise("RGB"), "WEBP", **ANIMATED),
    "gif": encoded(noise("P"), "GIF"),
    "gif animated": encoded(noise("RGB"), "GIF", **ANIMATED),
    "bmp": encoded(noise("RGB"), "BMP"),
    "avif": encoded(noise("RGB"), "AVIF"),
    **{
        f"tiff {mode} {how}": encoded(noise(mode), "TIFF", compression=how)
        for mode, how in (("RGB", "raw"), ("RGB", "tiff_lzw"), ("CMYK", "raw"), ("I;16", "raw"),
                          ("RGB", "tiff_adobe_deflate"), ("RGB", "jpeg"), ("F", "raw"))
    },
}  # fmt: skip


def png_with(content: bytes, width: int, height: int, depth: int, colour: int) -> bytes:
    """A PNG that claims another size and kind, with a right checksum of its header."""
    header = struct.pack(">IIBB", width % 2**32, height % 2**32, depth, colour) + content[26:29]
    check = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return content[:16] + header + check + content[33:]


@st.composite
def pictures(draw: st.DrawFn) -> bytes:
    content = ORIGINALS[draw(st.sampled_from(sorted(ORIGINALS)))]
    if content.startswith(b"\x89PNG") and draw(st.booleans()):
        sides = st.sampled_from(SIDES)
        depth, colour = draw(st.sampled_from([1, 8, 16, 0])), draw(st.sampled_from([0, 2, 3, 4, 6]))
        content = png_with(content, draw(sides), draw(sides), depth, colour)
    return break_bytes(draw, content, 200) if draw(st.integers(0, 9)) else content


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures") / "a.png"


def load(file: Path, mode: Mode) -> tuple[Picture, Tensor]:
    (picture,) = check_pictures({(file, mode): "here"}).values()
    return picture, picture.load()


@given(content=pictures(), mode=st.sampled_from(["RGB", "L"]))
@examples(full=1500, fast=150)
def test_pictures(file: Path, content: bytes, mode: Mode) -> None:
    file.write_bytes(content)
    loaded = refused_or("images", lambda: load(file, mode))
    if loaded is not None:
        picture, pixels = loaded
        assert pixels.shape == (3 if mode == "RGB" else 1, picture.height, picture.width)
        assert pixels.min() >= 0
        assert pixels.max() <= 1


@pytest.mark.parametrize("name", sorted(ORIGINALS))
def test_whole_pictures_are_read(file: Path, name: str) -> None:
    file.write_bytes(ORIGINALS[name])
    if name.startswith("tiff F"):
        with pytest.raises(DataError, match="must have 8 or 16 bits"):
            load(file, "RGB")
    else:
        assert load(file, "RGB")[1].shape[0] == 3


def bomb_png() -> bytes:
    return png_with(encoded(noise("1"), "PNG"), 60_000, 60_000, 1, 0)


def bomb_gif() -> bytes:
    content = bytearray(ORIGINALS["gif"])
    content[6:10] = struct.pack("<HH", 65_535, 65_535)
    return bytes(content)


def bomb_webp() -> bytes:
    """An extended header that claims 16384 x 16384, before a picture of 40 x 36."""
    canvas = (16_383).to_bytes(3, "little") * 2
    chunk = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas
    inner = ORIGINALS["webp"][12:]
    return b"RIFF" + struct.pack("<I", 4 + len(chunk) + len(inner)) + b"WEBP" + chunk + inner


def bomb_text() -> bytes:
    """A PNG with a compressed text that grows to a gigabyte."""
    content = ORIGINALS["png RGB"]
    data = b"x\0\0" + zlib.compress(bytes(2**26), 9)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data
    return content[:33] + chunk + struct.pack(">I", zlib.crc32(b"zTXt" + data)) + content[33:]


@pytest.mark.parametrize("bomb", [bomb_png, bomb_gif, bomb_webp, bomb_text])
def test_small_files_that_would_fill_the_memory_are_refused(
    file: Path, bomb: Callable[[], bytes]
) -> None:
    file.write_bytes(bomb())
    assert file.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"here: .*a\.png"):
        load(file, "RGB")


def test_a_size_between_pillow_s_warning_and_its_error_is_an_error(file: Path) -> None:
    file.write_bytes(png_with(encoded(noise("1"), "PNG"), 10_000, 9_000, 1, 0))
    with pytest.raises(DataError, match=f"at most {MAX_PIXELS:,} pixels, got 10000 x 9000"):
        load(file, "RGB")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_pickle_in_place_of_a_picture_is_refused_unread(file: Path, mode: Mode) -> None:
    file.write_bytes(planted(file.parent / "mark"))
    with pytest.raises(DataError, match="is not a readable picture"):
        load(file, mode)
    assert not (file.parent / "mark").exists()


def test_formats_that_start_other_programs_are_not_tried(file: Path) -> None:
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n")
    assert Image.open(file).format == "EPS"  # Pillow would run Ghostscript on it
    with pytest.raises(DataError, match="is not a readable picture: cannot identify"):
        load(file, "RGB")


def test_originals_cover_what_they_claim() -> None:
    frames = [n for n, c in ORIGINALS.items() if _frames(c) > 1]
    assert frames == ["png animated", "mpo", "webp animated", "gif animated"]


def _frames(content: bytes) -> int:
    return sum(1 for _ in ImageSequence.Iterator(Image.open(io.BytesIO(content))))
