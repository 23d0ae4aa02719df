import io
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from customized_grpo.pictures import Mark, png, read_strip, save_grid, save_strip
from customized_grpo.types import Example


def test_grid_shows_reference_and_columns_in_order(tmp_path: Path) -> None:
    shades = {"reference": 0.2, "base": 0.5, "tuned": 0.8}
    example = Example(
        id="x", prompt="a " * 60, references=(torch.full((3, 40, 80), 0.2),), subject="x"
    )
    columns = {name: torch.full((2, 3, 64, 64), shades[name]) for name in ("base", "tuned")}
    path = tmp_path / "grid.png"
    save_grid(path, [example, example], columns)
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
    with Image.open(path) as image:
        row = [image.convert("L").getpixel((x, 26 + 30)) for x in range(image.width)]
    present = [round(255 * shade) for shade in shades.values()]
    assert [value for value in present if value in row] == present
    first = [row.index(value) for value in present]
    assert first == sorted(first)


def test_texts_of_any_letters_travel_in_a_picture() -> None:
    """Of a file whose name is not UTF-8 as well, as Python gives it."""
    texts = {"prompt": "süß 🦊", "references": os.fsdecode(b"caf\xe9.png")}
    with Image.open(io.BytesIO(png(torch.zeros(3, 8, 8), texts))) as image:
        assert image.text == {"prompt": "süß 🦊", "references": "caf?.png"}  # pyright: ignore


def test_large_pictures_shrink_to_a_cell(tmp_path: Path) -> None:
    example = Example(id="x", prompt="x", references=(torch.zeros(3, 512, 256),), subject="x")
    save_grid(tmp_path / "a.png", [example], {"base": torch.zeros(1, 3, 1024, 1024)})
    with Image.open(tmp_path / "a.png") as image:
        assert image.height < 200


WRONG = Mark("wrong", "not right", "#FFFFFF", "#0000FF")
GREY = Example(id="x", prompt="x", references=(torch.full((3, 64, 64), 0.5),), subject="x")


def blue(path: Path) -> list[tuple[int, int]]:
    """Where a mark's paper is."""
    with Image.open(path) as image:
        is_blue = (np.asarray(image.convert("RGB")) == (0, 0, 255)).all(-1)
    return [(int(y), int(x)) for y, x in zip(*is_blue.nonzero(), strict=True)]


def test_marks_stand_beneath_the_pictures_that_are_wrong(tmp_path: Path) -> None:
    grey = torch.full((2, 3, 64, 64), 0.5)
    columns, marks = {"base": grey, "tuned": grey}, {"base": [[], [WRONG]], "tuned": [[], []]}
    save_grid(tmp_path / "a.png", [GREY, GREY], columns, marks=marks)
    with Image.open(tmp_path / "a.png") as image:
        rows = [image.getpixel((x, 26)) == (128,) * 3 for x in range(image.width)]
    lefts = [x for x, is_grey in enumerate(rows) if is_grey and not rows[x - 1]]
    _, base, tuned = lefts
    found = blue(tmp_path / "a.png")
    second = 26 + 144 + 26 + 8  # header, picture, marks, gap
    beneath = [(y, x) for y, x in found if second + 144 <= y <= second + 144 + 26]
    assert min(x for _, x in beneath) >= base
    assert max(x for _, x in beneath) < tuned
    legend = [(y, x) for y, x in found if y > second + 144 + 26]
    assert legend
    assert sorted(beneath + legend) == sorted(found)


@pytest.mark.parametrize("marks", [None, {"base": [[]]}])
def test_a_grid_without_marks_has_no_legend(tmp_path: Path, marks: dict | None) -> None:
    save_grid(tmp_path / "a.png", [GREY], {"base": torch.zeros(1, 3, 64, 64)}, marks=marks)
    with Image.open(tmp_path / "a.png") as image:
        assert image.height == 26 + 144 + 8


def test_a_long_prompt_stays_in_its_row(tmp_path: Path) -> None:
    """In letters that a phone shows, if they fit; 200 characters do in smaller ones."""
    heights = []
    for prompt in ("a fox", "a fox wearing " + "a very large hat and " * 9):
        example = Example(id="x", prompt=prompt, references=GREY.references, subject="x")
        save_grid(tmp_path / "a.png", [example], {})
        with Image.open(tmp_path / "a.png") as image:
            text = np.asarray(image.convert("L"))[26:, 160:]
        heights.append(int(np.nonzero(text < 128)[0].max()))
    assert 14 <= heights[0] < heights[1] <= 144


def prompt_of(folder: Path, *prompts: str) -> np.ndarray:
    """The column of prompts as it is drawn, in grey."""
    examples = [
        Example(id=str(i), prompt=p, references=GREY.references, subject="x")
        for i, p in enumerate(prompts)
    ]
    save_grid(folder / "a.png", examples, {"base": torch.zeros(len(prompts), 3, 8, 8)})
    with Image.open(folder / "a.png") as image:
        return np.asarray(image.convert("L"))[26:, 160:380].copy()


@pytest.mark.parametrize(
    "letters", ["äöüÄÖÜß", "éèêçñåø", "łőžğıš", "αβγΩ", "событ", "\u2013\u2014“”…€"]
)
def test_letters_of_europe_are_drawn_and_are_no_boxes(tmp_path: Path, letters: str) -> None:
    drawn = [prompt_of(tmp_path, letter * 4).tobytes() for letter in letters]
    assert len(set(drawn)) == len(letters)
    box = prompt_of(tmp_path, "\U0010fffd" * 4)
    assert box.tobytes() not in drawn
    assert (box < 128).any()
    composed, parts = (unicodedata.normalize(form, letters) for form in ("NFC", "NFD"))
    assert (prompt_of(tmp_path, composed) == prompt_of(tmp_path, parts)).all()


@pytest.mark.parametrize(
    "prompt",
    ["a dog on the beach " * 60, "x" * 4000, "W" * 40, "ü" * 400, "一只戴红帽的狗" * 80],
)
def test_text_stays_in_its_row_and_column(tmp_path: Path, prompt: str) -> None:
    drawn = prompt_of(tmp_path, prompt, "")
    assert (drawn[:144] < 128).any()
    assert (drawn[144:] == 255).all()  # neither in the gap nor over the next row
    with Image.open(tmp_path / "a.png") as image:
        assert (np.asarray(image.convert("L"))[26:, 380:388] == 255).all()  # the gap on the right


def test_a_heading_stays_in_its_column(tmp_path: Path) -> None:
    images = torch.ones(1, 3, 8, 8)
    save_grid(tmp_path / "a.png", [GREY], {"x" * 90: images, "": images})
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("L"))[:26]
    assert (pixels[:, 388:532] < 128).any()
    assert (pixels[:, 540:] == 255).all()


def test_a_strip_is_read_as_it_was_written(tmp_path: Path) -> None:
    images = torch.arange(3 * 3 * 4 * 5).view(3, 3, 4, 5) / 255
    save_strip(tmp_path / "a.png", images)
    assert torch.equal(read_strip(tmp_path / "a.png", 3), images)
