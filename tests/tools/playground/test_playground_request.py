"""What someone has filled in is checked; what is wrong is said in words for the page."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from customized_grpo.data.images import Picture
from customized_grpo.errors import CustomizedGRPOError
from customized_grpo.tools.playground.request import describe_picture, read_request

FOX = "a fox"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures that people upload, good and bad ones."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (96, 120, 3), np.uint8)
    good = Image.fromarray(noise)
    good.save("good.png")
    good.resize((31, 400)).save("small.png")
    Image.new("1", (9500, 9500)).save("huge.png")
    frames = [good.crop((0, 0, 64, 64)), Image.new("RGB", (64, 64))]
    frames[0].save("animated.gif", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save("clear.png")
    Image.new("RGB", (2000, 1000)).save("large.jpg")
    content = Path("good.png").read_bytes()
    Path("truncated.png").write_bytes(content[: len(content) // 2])
    Path("text.png").write_text("this is no picture")
    Path("empty.png").touch()
    Path("page.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("small.png", "must be at least 32 px on each side"),
        ("huge.png", "at most 89,478,485 pixels, got 9500 x 9500"),
        ("truncated.png", "not a readable picture"),
        ("text.png", "not a readable picture"),
        ("empty.png", "is empty"),
        ("page.svg", "a drawing (SVG)"),
        ("gone.png", "not a readable picture"),
    ],
)
def test_a_bad_upload_is_named_without_its_folder(folder: Path, name: str, expected: str) -> None:
    for check in (describe_picture, lambda path: read_request(path, FOX, 0)):
        with pytest.raises(CustomizedGRPOError) as caught:
            check(folder / name)
        assert str(caught.value).startswith(f"reference picture: {name} ")
        assert expected in str(caught.value)
        assert str(folder) not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("good.png", "good.png: 120 x 96 px"),
        ("animated.gif", "animated.gif: 64 x 64 px; it is animated: only the first frame is used"),
        ("clear.png", "clear.png: 64 x 64 px; transparent parts become white"),
        (
            "large.jpg",
            "large.jpg: 2000 x 1000 px; reduced to 1448 x 724 (1,048,576 px are used)",
        ),
    ],
)
def test_what_becomes_of_an_upload_is_said(name: str, expected: str) -> None:
    assert describe_picture(Path(name)) == expected


@pytest.mark.parametrize("name", ["good.png", "animated.gif", "clear.png", "large.jpg"])
def test_pixels_are_those_that_generate_reads(name: str) -> None:
    request = read_request(Path(name), "  a fox\n", 7.0)
    (reference,) = request.example.references
    expected = Picture(Path(name), "RGB", 0, 0).load()
    assert reference.shape == expected.shape
    assert (reference == expected).all()
    assert (request.example.prompt, request.seed, request.strength) == (FOX, 7, 1.0)


@pytest.mark.parametrize(
    ("picture", "prompt", "seed", "strength", "expected"),
    [
        (None, FOX, 0, 1, "reference picture: must be given, got none"),
        ("good.png", " \n", 0, 1, "prompt: must say what to show, got nothing"),
        ("good.png", "a\0b", 0, 1, "prompt: must say what to show"),
        ("good.png", "a" * 2001, 0, 1, "prompt: must have at most 2000 characters, got 2001"),
        ("good.png", FOX, None, 1, "seed: must be a whole number from 0"),
        ("good.png", FOX, 1.5, 1, "seed: must be a whole number from 0 to 2^32 - 1, got 1.5"),
        ("good.png", FOX, -1, 1, "seed: must be a whole number from 0"),
        ("good.png", FOX, 2**32, 1, "seed: must be a whole number from 0"),
        ("good.png", FOX, math.nan, 1, "seed: must be a whole number from 0"),
        ("good.png", FOX, math.inf, 1, "seed: must be a whole number from 0"),
        ("good.png", FOX, "3", 1, "seed: must be a whole number from 0"),
        ("good.png", FOX, 0, None, "LoRA strength: must be a number"),
        ("good.png", FOX, 0, math.nan, "LoRA strength: must be a number"),
    ],
)
def test_a_mistake_is_named(
    picture: str | None, prompt: str, seed: object, strength: object, expected: str
) -> None:
    with pytest.raises(CustomizedGRPOError) as caught:
        read_request(picture and Path(picture), prompt, seed, None, strength)  # pyright: ignore
    assert expected in str(caught.value)
