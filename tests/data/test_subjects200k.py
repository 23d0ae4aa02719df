"""A tiny parquet dataset in the published schema, through the same load_dataset."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from customized_grpo.data.subjects200k import Subjects200KConfig
from customized_grpo.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets", reason="needs the extra [datasets]")

SIDE = 64
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "collection": datasets.Value("string"),
        "quality_assessment": {
            name: datasets.Value("int64")
            for name in ("compositeStructure", "objectConsistency", "imageQuality")
        },
        "description": {
            **dict.fromkeys(
                ("item", "description_0", "description_1", "category"), datasets.Value("string")
            ),
            "description_valid": datasets.Value("bool"),
        },
    }
)


@pytest.fixture(autouse=True)
def cache_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pair(padding: int = 8, side: int = SIDE, gap: int | None = None) -> bytes:
    """Red at the left, blue at the right, white padding around and between."""
    gap = padding if gap is None else gap
    image = Image.new("RGB", (2 * side + 2 * padding + gap, side + 2 * padding), "white")
    image.paste("red", (padding, padding, padding + side, padding + side))
    left = padding + side + gap
    image.paste("blue", (left, padding, left + side, padding + side))
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def row(n: int, **changes) -> dict:
    quality = dict.fromkeys(("compositeStructure", "objectConsistency", "imageQuality"), 5)
    text = {
        "item": f"Thing {n}",
        "description_0": f"Left picture {n}.",
        "description_1": f"Right picture {n}.",
        "category": "Objects",
        "description_valid": True,
    }
    base = {
        "image": {"bytes": pair(), "path": None},
        "collection": "collection_1",
        "quality_assessment": quality,
        "description": text,
    }
    for key, value in changes.items():
        base[key] = base[key] | value if isinstance(value, dict) else value
    return base


def write(folder: Path, rows: list[dict]) -> str:
    (folder / "data").mkdir(parents=True)
    dataset = datasets.Dataset.from_list(rows, features=FEATURES)
    dataset.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return str(folder)


@pytest.mark.parametrize(("padding", "gap"), [(8, 8), (16, 16), (8, 16), (0, 0)])
def test_reference_is_the_left_picture_and_prompt_the_text_of_the_right_one(
    tmp_path: Path, padding: int, gap: int
) -> None:
    image = {"bytes": pair(padding, gap=gap)}
    path = write(tmp_path / "pairs", [row(n, image=image) for n in range(10)])
    source = Subjects200KConfig(path=path, held_out=0.2).build(seed=0)
    splits = source.splits
    assert [len(p) for p in (splits.training, splits.held_out, splits.validation)] == [6, 2, 2]
    for example in source.training(0, 3):
        number = example.subject.removeprefix("Thing ")
        assert example.prompt == f"Right picture {number}."
        assert example.references[0].shape == (3, SIDE, SIDE)
        assert torch.equal(example.references[0].amin((1, 2)), torch.tensor([1.0, 0, 0]))
        assert torch.equal(example.references[0].amax((1, 2)), torch.tensor([1.0, 0, 0]))
    assert source.listed()[0].references[0].shape == (3, SIDE, SIDE)


def test_an_item_is_on_one_side_of_the_split(tmp_path: Path) -> None:
    rows = [row(n, description={"item": f"Thing {n % 4}"}) for n in range(16)]
    splits = Subjects200KConfig(path=write(tmp_path / "pairs", rows)).build(seed=0).splits
    parts = [{e.subject for e in p} for p in (splits.training, splits.held_out, splits.validation)]
    assert [len(p) for p in parts] == [2, 1, 1]
    assert len(set.union(*parts)) == 4


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, {0, 1}),
        ({"min_quality": 4}, {0, 1, 2}),
        ({"min_quality": 0}, {0, 1, 2, 3, 5}),
        ({"min_quality": 0, "collection": "collection_2"}, {1, 5}),
    ],
)
def test_filters(tmp_path: Path, fields: dict, kept: set[int]) -> None:
    rows = [
        row(0),
        row(1, collection="collection_2"),
        row(2, quality_assessment={"imageQuality": 4}),
        row(3, quality_assessment=None),
        row(4, description={"description_valid": False}),
        row(5, collection="collection_2", quality_assessment={"objectConsistency": None}),
        row(6, description={"description_1": " "}),
    ]
    source = Subjects200KConfig(path=write(tmp_path / "p", rows), **fields).build(seed=0)
    splits = source.splits
    entries = (*splits.training, *splits.held_out, *splits.validation)
    assert {int(e.id.split("/")[-1]) for e in entries} == kept
    assert f"p: {len(kept)} of 7 pairs are used, the others are of another" in source.remarks[0]


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="path: must be a hub id or a folder of parquet files"):
        Subjects200KConfig(path=str(tmp_path / "none")).build(seed=0)
    path = write(tmp_path / "a", [row(n) for n in range(4)])
    with pytest.raises(DataError, match="no pair is left"):
        Subjects200KConfig(path=path, collection="collection_9").build(seed=0)
    path = write(tmp_path / "b", [row(0), row(0)])
    with pytest.raises(DataError, match="must show at least two items"):
        Subjects200KConfig(path=path).build(seed=0)
    single = io.BytesIO()
    Image.new("RGB", (80, 80)).save(single, "png")
    path = write(tmp_path / "c", [row(n, image={"bytes": single.getvalue()}) for n in range(3)])
    with pytest.raises(DataError, match=r"row 0: image must be two square pictures.*got 80 x 80"):
        Subjects200KConfig(path=path).build(seed=0)
    (tmp_path / "d" / "data").mkdir(parents=True)
    other = datasets.Dataset.from_dict({"text": ["a"]})
    other.to_parquet(tmp_path / "d" / "data" / "train-0.parquet")
    with pytest.raises(DataError, match=r"must have the columns .*, misses \['collection"):
        Subjects200KConfig(path=str(tmp_path / "d")).build(seed=0)


def test_pictures_that_break_or_differ_in_size_are_named_by_row(tmp_path: Path) -> None:
    images = [pair(), pair(), pair(side=128), pair()[:150]]
    rows = [row(n, image={"bytes": b}) for n, b in enumerate(images)]
    source = Subjects200KConfig(path=write(tmp_path / "a", rows)).build(seed=0)
    splits = source.splits
    entries = (*splits.training, *splits.held_out, *splits.validation)
    pictures = {int(e.id.split("/")[-1]): e.references[0] for e in entries}
    assert pictures[1].load().shape == (3, SIDE, SIDE)
    with pytest.raises(DataError, match=r"row 2: image must have pictures of 64 px.*got 128"):
        pictures[2].load()
    with pytest.raises(DataError, match="row 3: image is not a readable picture"):
        pictures[3].load()
