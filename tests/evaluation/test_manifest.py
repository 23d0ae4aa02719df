"""A folder of pictures is what the benchmark asks for, or one line says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from worlds import smooth, write_jsonl, write_outputs

from customized_grpo.config import JsonlSet
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.evaluation.items import BenchmarkSet
from customized_grpo.evaluation.manifest import MANIFEST, read_outputs
from customized_grpo.evaluation.sets import build_set


@pytest.fixture
def wanted(tmp_path: Path) -> BenchmarkSet:
    return build_set(JsonlSet(path=str(write_jsonl(tmp_path))), num_images=1)


@pytest.fixture
def folder(tmp_path: Path, wanted: BenchmarkSet) -> Path:
    return write_outputs(tmp_path / "outputs", wanted, lambda item: smooth(item.prompt_index))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]


def rewrite(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / MANIFEST).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_pictures_come_in_the_order_of_the_items(folder: Path, wanted: BenchmarkSet) -> None:
    rewrite(folder, rows(folder)[::-1])
    found = read_outputs(folder, wanted)
    assert found.items == wanted.items
    assert found.missing == ()
    assert [photo.name for photo in found.photos] == [f"pictures/{n:04d}.png" for n in range(9)]
    assert found.photos[0].digest == found.photos[3].digest  # equal pictures
    assert found.photos[0].digest != found.photos[1].digest


def test_absolute_paths_in_a_relative_folder(
    folder: Path, wanted: BenchmarkSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [photo.name for photo in read_outputs(folder, wanted).photos]
    rewrite(folder, [row | {"file": str(folder / row["file"])} for row in rows(folder)])
    monkeypatch.chdir(folder.parent)
    found = read_outputs(Path(folder.name), wanted)
    assert [photo.name for photo in found.photos] == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subject": "cat"}, r"jsonl:1: cat, prompt 0, .* is not in the benchmark; remove the li"),
        ({"reference": "rex/1.png"}, r"reference rex/1\.png, index 0 is not in the benchmark"),
        ({"prompt": "a sks dog on the beach"}, r"prompt: must be 'a dog on the beach', got"),
        ({"file": "../prompts.png"}, r"jsonl:1: file: must stay in the folder"),
        ({"file": "pictures/nowhere.png"}, r"nowhere\.png is not a readable picture"),
        ({"file": "pictures/0001.png"}, r"jsonl:2: file: must be a picture of its own, got the"),
        ({"file": "pictures"}, r"pictures must be a file, got a folder"),
        ({"prompt_index": "0"}, r"prompt_index: must be a whole number from 0, got '0'"),
        ({"prompt_index": 1, "prompt": "a red dog"}, r"rex, prompt 1, .*: is there twice"),
        ({"extra": 1}, r"unknown key 'extra'; keys are subject"),
        ({"reference": 3}, r"reference: must be a photo's name or a list of them, got 3"),
    ],
)
def test_mistakes_are_named(
    folder: Path, wanted: BenchmarkSet, change: dict[str, Any], message: str
) -> None:
    lines = rows(folder)
    rewrite(folder, [lines[0] | change, *lines[1:]])
    with pytest.raises(DataError, match=message):
        read_outputs(folder, wanted)


def test_half_of_it_is_not_all_of_it(folder: Path, wanted: BenchmarkSet) -> None:
    rewrite(folder, rows(folder)[4:])
    with pytest.raises(DataError) as caught:
        read_outputs(folder, wanted)
    assert "mug, prompt 0, reference mug/0.png, index 0: no line" in str(caught.value)
    assert "4 of 9 pictures are missing" in str(caught.value)
    found = read_outputs(folder, wanted, allow_partial=True)
    assert found.items == wanted.items[4:]
    assert found.missing == wanted.items[:4]


def test_an_unreadable_picture_counts_as_missing(folder: Path, wanted: BenchmarkSet) -> None:
    file = folder / "pictures" / "0003.png"
    file.write_bytes(file.read_bytes()[:200])  # its header is whole
    found = read_outputs(folder, wanted, allow_partial=True)
    assert found.missing == (wanted.items[3],)
    file.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"0003\.png is not a readable picture.*1 of 9 pictures"):
        read_outputs(folder, wanted)


def test_a_wrong_folder_is_named(tmp_path: Path, wanted: BenchmarkSet) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"images: must be a folder with manifest\.jsonl"):
            read_outputs(folder, wanted)
    (tmp_path / MANIFEST).write_text("")
    with pytest.raises(DataError, match="must hold a picture of the benchmark, got none"):
        read_outputs(tmp_path, wanted, allow_partial=True)
