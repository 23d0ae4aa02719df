from pathlib import Path

import torch
from PIL import Image

from customized_grpo.pictures import save_grid
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


def test_large_pictures_shrink_to_a_cell(tmp_path: Path) -> None:
    example = Example(id="x", prompt="x", references=(torch.zeros(3, 512, 256),), subject="x")
    save_grid(tmp_path / "a.png", [example], {"base": torch.zeros(1, 3, 1024, 1024)})
    with Image.open(tmp_path / "a.png") as image:
        assert image.height < 200
