"""What is measured of a photo: thresholds hold for sharp and blurred, same and other."""

import io
from functools import cache
from itertools import combinations

import pytest
from data.pictures import DREAMBENCH, on_the_dataset
from made_photos import photo
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from customized_grpo.data.photos import photos_in
from customized_grpo.tools.init.measures import BLURRED, alike, fingerprint, sharpness


def blurred(image: Image.Image, share: float) -> Image.Image:
    """By a Gaussian whose radius is a share of the longest side."""
    return image.filter(ImageFilter.GaussianBlur(share * max(image.size)))


def saved(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    return Image.open(file)


@cache
def real_photos() -> list[Image.Image]:
    folders = sorted(p for p in DREAMBENCH.iterdir() if p.is_dir())
    paths = [path for folder in folders for path in photos_in(folder)[:2]]
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(ImageOps.exif_transpose(image).convert("RGB"))
            images[-1].thumbnail((512, 512))
    return images


def test_blur_lowers_the_sharpness_below_the_threshold() -> None:
    image = photo(size=(1200, 900))
    values = [sharpness(blurred(image, share)) for share in (0, 0.002, 0.005, 0.01)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 4 * BLURRED
    assert values[-1] < BLURRED


def test_a_sharp_subject_before_a_blurred_background_is_sharp() -> None:
    assert sharpness(photo(blur=12)) > BLURRED
    assert sharpness(blurred(photo(blur=12), 0.01)) < BLURRED


def test_copies_are_alike_and_other_photos_are_not() -> None:
    image = photo(1)
    width, height = image.size
    copies = [
        saved(image, 40),
        image.resize((200, 150)),
        ImageEnhance.Brightness(image).enhance(1.2),
        image.crop((width // 80, height // 80, width - width // 80, height - height // 80)),
    ]
    for copy in copies:
        assert alike(fingerprint(image), fingerprint(copy))
    for other in [*map(photo, range(2, 6)), ImageOps.mirror(image)]:
        assert not alike(fingerprint(image), fingerprint(other))


def test_plain_backgrounds_do_not_make_two_things_alike() -> None:
    def on_white(color: str) -> Image.Image:
        picture = Image.new("RGB", (170, 160), "white")
        picture.paste(color, (60, 60, 110, 110))
        return picture

    assert not alike(fingerprint(on_white("navy")), fingerprint(on_white("gold")))
    assert alike(fingerprint(on_white("navy")), fingerprint(on_white("navy")))


def test_a_picture_of_one_colour_has_no_sharpness() -> None:
    assert sharpness(Image.new("RGB", (100, 80), "teal")) == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(9000, 33), (33, 9000), (5000, 50)])
def test_the_longest_picture_has_numbers(size: tuple[int, int]) -> None:
    assert sharpness(photo(size=size)) >= 0


@on_the_dataset
def test_real_photos_are_sharp_and_their_blurred_copies_are_not() -> None:
    images = real_photos()
    assert all(sharpness(image) > BLURRED for image in images)
    assert all(sharpness(blurred(image, 0.004)) < BLURRED for image in images)


@on_the_dataset
def test_real_photos_are_told_apart_and_their_copies_found() -> None:
    images = real_photos()
    prints = [fingerprint(image) for image in images]
    copies = [fingerprint(saved(image.resize((300, 300)), 60)) for image in images]
    assert all(alike(a, b) for a, b in zip(prints, copies, strict=True))
    assert sum(alike(a, b) for a, b in combinations(prints, 2)) <= 1  # two drawings of one pose
