"""Every kind of picture a folder of photos may hold; the files are made by Pillow here."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from customized_grpo.data import images
from customized_grpo.data.folder import FolderConfig
from customized_grpo.data.images import KEPT_PIXELS, check_pictures, kept_size, reads_heic
from customized_grpo.errors import DataError


def load(path: Path, mode: images.Mode = "RGB") -> torch.Tensor:
    picture = check_pictures({(path, mode): "here"})[path, mode]
    pixels = picture.load()
    assert pixels.shape == (3 if mode == "RGB" else 1, picture.height, picture.width)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert 0 <= pixels.min() <= pixels.max() <= 1
    return pixels


def noise(height: int = 40, width: int = 48, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_lossless_formats_come_back_as_they_were(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    noise().save(path, lossless=True) if suffix == "webp" else noise().save(path)
    assert torch.equal(load(path), as_tensor(noise()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_pictures_stand_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    """The oracle is the meaning of the EXIF values, not Pillow's own transposition."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    flat = Image.new("RGB", (64, 40), "blue")
    flat.paste("red", (0, 0, 16, 16))  # top left, as stored
    flat.save(path, exif=exif, **({"quality": 100} if suffix == "jpg" else {}))
    pixels = load(path)
    # EXIF: where the stored first row and first column are, seen by a person.
    top = orientation in (1, 2, 5, 6)
    left = orientation in (1, 4, 5, 8)
    assert pixels.shape[1:] == ((64, 40) if orientation >= 5 else (40, 64))
    red = pixels[0] > 0.5
    assert bool(red[:12, :].any()) == top
    assert bool(red[:, :12].any()) == left
    assert red.sum() == pytest.approx(256, abs=40)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_oddly_typed_exif_data_do_no_harm(tmp_path: Path, suffix: str) -> None:
    """As some cameras write them: turned by 90 degrees, and a ResolutionUnit that is a BYTE."""
    tags = struct.pack("<HHHII", 2, 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x0128, 1, 1, 2)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags + bytes(4)
    path = tmp_path / f"a.{suffix}"
    noise().save(path, exif=exif)
    with Image.open(path) as stored:
        expected = as_tensor(stored.transpose(Image.Transpose.ROTATE_270))
    assert torch.equal(load(path), expected)


def test_transparency_lies_on_white_and_in_a_mask_on_black(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    image.paste((255, 255, 255, 255), (0, 0, 20, 40))
    image.paste((255, 0, 0, 128), (20, 0, 40, 20))
    image.save(path)
    pixels, mask = load(path), load(path, "L")
    assert pixels[:, 30, 30].tolist() == [1, 1, 1]
    assert pixels[:, 10, 30].tolist() == pytest.approx([1, 127 / 255, 127 / 255], abs=0.005)
    assert mask[0, 30, 30] == 0
    assert mask[0, 30, 10] == 1


def test_a_transparent_colour_of_a_palette_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.paste(1, (0, 0, 20, 40))
    image.save(tmp_path / "a.png", transparency=0)
    image.save(tmp_path / "b.gif", transparency=0)
    for name in ("a.png", "b.gif"):
        pixels = load(tmp_path / name)
        assert pixels[:, 5, 5].tolist() == [1, 0, 0]
        assert pixels[:, 5, 30].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("CMYK", (0, 255, 255, 0), (1, 0, 0)),
        ("L", 102, (0.4, 0.4, 0.4)),
        ("LA", (51, 0), (1, 1, 1)),
        ("1", 1, (1, 1, 1)),
        ("YCbCr", (255, 128, 128), (1, 1, 1)),
    ],
)
def test_colour_modes_become_rgb(tmp_path: Path, mode: str, color, expected) -> None:
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    path = tmp_path / f"a.{suffix}"
    Image.new(mode, (40, 40), color).save(path, **({"quality": 100} if suffix == "jpg" else {}))
    assert load(path)[:, 20, 20].tolist() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    shades = np.linspace(0, 65535, 40 * 40, dtype=np.uint16).reshape(40, 40)
    Image.fromarray(shades).save(tmp_path / f"a.{suffix}")
    pixels = load(tmp_path / f"a.{suffix}")
    assert torch.equal(pixels[0], pixels[2])
    expected = torch.from_numpy(shades.astype(np.float32) / 65535)
    assert (pixels[0] - expected).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation_counts(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (40, 40), c) for c in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as saved:
        assert saved.n_frames == 3  # pyright: ignore
    assert load(path)[:, 5, 5].tolist() == [1, 0, 0]


def test_a_colour_profile_does_no_harm(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise().save(tmp_path / "a.png", icc_profile=profile)
    assert torch.equal(load(tmp_path / "a.png"), as_tensor(noise()))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "gif"])
@settings(
    max_examples=8,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(share=st.floats(0.02, 0.97))
def test_truncated_files_are_refused_by_name(tmp_path: Path, suffix: str, share: float) -> None:
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, format={"jpg": "jpeg"}.get(suffix, suffix))
    whole = buffer.getvalue()
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=rf"here: .*a\.{suffix} (is not a readable|must)") as caught:
        check_pictures({(path, "RGB"): "here"})
    assert "\n" not in str(caught.value)


def test_what_is_no_picture_for_us_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    noise(31, 400).save(tmp_path / "tiny.png")
    for mode in ("I", "F"):
        Image.new(mode, (40, 40), 7).save(tmp_path / f"{mode}.tiff")
    for name, text in {
        "none.png": "is not a readable picture",
        "folder.png": "must be a file",
        "tiny.png": "must be at least 32 px on each side.*got 400 x 31",
        "I.tiff": "must have 8 or 16 bits.*mode I",
        "F.tiff": "must have 8 or 16 bits.*mode F",
    }.items():
        with pytest.raises(DataError, match=rf"here: .*{name} {text}"):
            check_pictures({(tmp_path / name, "RGB"): "here"})
    noise(32, 32).save(tmp_path / "least.png")
    assert load(tmp_path / "least.png").shape == (3, 32, 32)


def test_large_pictures_are_reduced_in_area_only(tmp_path: Path) -> None:
    image = ImageOps.grayscale(Image.linear_gradient("L").resize((2400, 1600))).convert("RGB")
    image.save(tmp_path / "a.jpg", quality=95)
    pixels = load(tmp_path / "a.jpg")
    assert pixels.shape[1] * pixels.shape[2] == pytest.approx(KEPT_PIXELS, rel=0.002)
    assert pixels.shape[2] / pixels.shape[1] == pytest.approx(1.5, rel=0.002)
    assert pixels[0, :, 0].diff().min() > -0.02  # still a gradient from black to white
    assert pixels[0, 0, 0] < 0.02 < 0.98 < pixels[0, -1, 0]


@given(st.integers(32, 9000), st.integers(32, 9000))
def test_kept_size_never_grows_and_keeps_the_shape(height: int, width: int) -> None:
    tall, wide = kept_size(height, width)
    assert tall <= height
    assert wide <= width
    if height * width <= KEPT_PIXELS:
        assert (tall, wide) == (height, width)
    else:
        assert tall * wide == pytest.approx(KEPT_PIXELS, rel=0.02)


def test_the_first_mistake_is_the_one_that_is_named(tmp_path: Path) -> None:
    for i in range(30):
        noise().save(tmp_path / f"{i}.png")
    for i in (7, 21):
        (tmp_path / f"{i}.png").write_bytes(b"")
    files: dict[images.File, str] = {(tmp_path / f"{i}.png", "RGB"): f"line {i}" for i in range(30)}
    with pytest.raises(DataError, match="line 7: "):
        check_pictures(files)


def test_a_picture_that_breaks_during_a_run_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise().save(path)
    picture = check_pictures({(path, "RGB"): "here"})[path, "RGB"]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"a\.png is not a readable picture"):
        picture.load()


def test_heic_is_a_photo_like_others(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif", reason="needs the extra [heic]")
    assert reads_heic()
    photo = tmp_path / "rex" / "IMG_1.HEIC"
    photo.parent.mkdir()
    picture = Image.new("RGB", (96, 64), "red")
    picture.paste("blue", (48, 0, 96, 64))
    picture.save(photo, format="HEIF")
    entry = FolderConfig(path=str(photo.parent)).build(0).splits.training[0]
    pixels = entry.references[0].load()
    assert pixels.shape == (3, 64, 96)
    assert (pixels[:, 32, 8] - torch.tensor([1.0, 0, 0])).abs().max() < 0.1
    assert (pixels[:, 32, 88] - torch.tensor([0, 0, 1.0])).abs().max() < 0.1
    photo.write_bytes(photo.read_bytes()[:200])
    with pytest.raises(DataError, match=r"IMG_1\.HEIC is "):
        FolderConfig(path=str(photo.parent)).build(0)
