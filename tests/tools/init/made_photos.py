"""Photos as a person takes them, made up: a patterned subject in front of a textured place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

SUBJECT = np.array([[200, 90, 30], [240, 150, 60]])  # the stripes of a tiger
PLACES = np.array([[60, 140, 80], [90, 120, 180], [150, 150, 140], [70, 110, 110]])


def photo(
    seed: int = 0,
    size: tuple[int, int] = (640, 480),
    center: tuple[float, float] = (0.5, 0.5),
    radius: float = 0.25,
    blur: float = 0,
) -> Image.Image:
    """size = (width, height); centre and radius of the subject as shares of them; blur of the
    background in pixels."""
    random = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[:height, :width]
    place = PLACES[seed % len(PLACES)]
    cells = random.integers(-35, 36, (height // 4 + 1, width // 4 + 1, 1))
    background = place + cells.repeat(4, 0).repeat(4, 1)[:height, :width]
    picture = Image.fromarray(background.clip(0, 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(blur))
    angle = random.uniform(0, 3)
    stripes = (np.sin((x * np.cos(angle) + y * np.sin(angle)) / 3) > 0).astype(int)
    inside = ((x / width - center[0]) ** 2 + (y / height - center[1]) ** 2) < radius**2
    pixels = np.where(inside[..., None], SUBJECT[stripes], np.asarray(picture))
    return Image.fromarray(pixels.astype(np.uint8))


def take(folder: Path, count: int, size: tuple[int, int] = (640, 640)) -> Path:
    """A folder with so many good photos, a.jpg, b.jpg, ..."""
    folder.mkdir(parents=True)
    for number in range(count):
        place = (0.5 + 0.05 * (number % 3 - 1), 0.5)
        photo(number, size, place).save(folder / f"{chr(97 + number)}.jpg", quality=92)
    return folder
