"""Datasets in the hub's form, through the library's own load_dataset."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import ROOT, changed
from pictures import paint
from PIL import Image

from customized_grpo.cli.main import main
from customized_grpo.config import RunConfig
from customized_grpo.data import streamed
from customized_grpo.data.hf import HfConfig
from customized_grpo.data.listed import ListedSource
from customized_grpo.data.streamed import StreamedSource
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.training.train import train

datasets = pytest.importorskip("datasets", reason="needs the extra [datasets]")

SYNCD = {"masks": ("mask",), "heading": True}


@pytest.fixture(autouse=True)
def cache_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(shade: int, size: tuple[int, int] = (48, 40), mode: str = "RGB") -> dict[str, Any]:
    buffer = io.BytesIO()
    color = shade if mode == "L" else (shade, 0, 0)
    Image.new(mode, size, color).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


def syncd_row(n: int, **changes: Any) -> dict[str, Any]:
    """As in QWW/Syncd_filtered, by the loader of its authors (DivRL): a heading, then prompts."""
    caption = f"Captions of {n}:\nthing {n} on a desk\n\nthing {n} in the grass\n"
    row = {"image": picture(n), "mask": picture(255, mode="L"), "caption": caption}
    return row | {"file_name": f"{n}.png"} | changes


def write(folder: Path, rows: list[dict[str, Any]], **types: Any) -> str:
    features = {name: datasets.Value("string") for name in rows[0]}
    features |= {name: datasets.Image() for name in ("image", "mask") if name in rows[0]}
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features | types))
    (folder / "data").mkdir(parents=True)
    table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return str(folder)


def listed(**fields: Any) -> ListedSource:
    source = HfConfig(**fields).build(0)
    assert isinstance(source, ListedSource)
    return source


def number(prompt: str) -> int:
    return int(prompt.split()[1])


def test_the_columns_of_syncd_filtered(tmp_path: Path) -> None:
    rows = [syncd_row(n) for n in range(10)]
    rows += [syncd_row(10, caption=" \n"), syncd_row(11, image=None)]
    rows[0]["caption"] = "thing 0 alone"  # one line is a prompt, no heading
    source = listed(path=write(tmp_path / "set", rows), held_out=0.2, **SYNCD)
    splits = source.splits
    parts = (splits.training, splits.held_out, splits.validation)
    numbers = [{number(e.prompt) for e in part} for part in parts]
    assert [len(some) for some in numbers] == [6, 2, 2]
    assert set.union(*numbers) == set(range(10))
    assert len({e.id for part in parts for e in part}) == 9 * 2 + 1
    for example in source.training(0, 4):
        (reference,), (mask,) = example.references, example.reference_masks or ()
        assert reference.shape == (3, 40, 48)
        assert round(reference[0, 0, 0].item() * 255) == number(example.prompt)
        assert mask.unique().tolist() == [1]
    assert source.remarks == [
        f"{tmp_path / 'set'}: 10 rows, 19 examples, 10 pictures, 10 masks",
        "1 rows not used: no text in the column caption",
        "1 rows not used: no picture in the columns image",
    ]


def test_lists_of_references_and_captions_and_words_for_the_subject(tmp_path: Path) -> None:
    rows = [
        {"front": picture(n), "more": [picture(n), picture(n)], "text": [f"t {n}", f"u {n}"]}
        | {"item": f"thing {n // 2}"}
        for n in range(8)
    ]
    texts, pictures = datasets.List(datasets.Value("string")), datasets.List(datasets.Image())
    path = write(tmp_path / "set", rows, front=datasets.Image(), more=pictures, text=texts)
    config = {"references": ("front", "more"), "caption": "text", "subject": "item"}
    splits = listed(path=path, held_out=0.25, **config).splits
    parts = [{e.subject for e in p} for p in (splits.training, splits.held_out, splits.validation)]
    assert [len(part) for part in parts] == [2, 1, 1]
    assert len(set.union(*parts)) == 4  # rows of a subject stay together
    assert {len(e.references) for e in splits.training} == {3}
    assert len(splits.training) == 2 * 2 * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_in_a_zip(tmp_path: Path, streaming: bool) -> None:
    """As many sets on the hub have them; the library leaves them there."""
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"t {n}"}) for n in range(6)]
    (tmp_path / "set").mkdir()
    with zipfile.ZipFile(tmp_path / "set" / "train.zip", "w") as file:
        for n in range(6):
            file.writestr(f"{n}.png", picture(n)["bytes"])
        file.writestr("metadata.jsonl", "\n".join(lines))
    config = HfConfig(path=str(tmp_path / "set"), caption="text", held_out=0.2, streaming=streaming)
    for example in config.build(0).training(0, 3):
        (reference,) = example.references
        assert round(reference[0, 0, 0].item() * 255) == number(example.prompt)


def test_long_lists_of_pictures(tmp_path: Path) -> None:
    rows = [{"image": [picture(n), picture(n)], "caption": f"t {n}"} for n in range(6)]
    path = write(tmp_path / "set", rows, image=datasets.LargeList(datasets.Image()))
    assert {len(e.references) for e in listed(path=path, held_out=0.2).splits.training} == {2}


@pytest.mark.parametrize("streaming", [False, True])
def test_class_labels_are_read_by_their_names(tmp_path: Path, streaming: bool) -> None:
    label = datasets.ClassLabel(names=["cat", "dog", "fox"])
    rows = [
        {"image": picture(n), "caption": f"t {n}", "item": n % 3, "each": [n % 3]} for n in range(9)
    ]
    path = write(tmp_path / "set", rows, item=label, each=datasets.List(label))
    fields = {"path": path, "held_out": 0.1, "streaming": streaming}
    for words in ({"subject": "item"}, {"reference_subjects": ("each",)}):
        source = HfConfig(**fields, **words).build(0)
        for example in source.training(0, 2):
            assert example.subject == label.int2str(number(example.prompt) % 3)


def test_a_column_says_which_reference_shows_which_subject(tmp_path: Path) -> None:
    rows = [
        {"shown": [picture(n), picture(n)], "text": f"both {n}", "names": ["a dog", f"a cat {n}"]}
        for n in range(4)
    ]
    texts, pictures = datasets.List(datasets.Value("string")), datasets.List(datasets.Image())
    path = write(tmp_path / "set", rows, shown=pictures, names=texts)
    columns = {"references": ("shown",), "caption": "text"}
    entries = listed(path=path, reference_subjects=("names",), **columns).splits.training
    for entry in entries:
        n = number(entry.prompt)
        assert entry.reference_subjects == ("a dog", f"a cat {n}")
        assert entry.subject == f"a dog and a cat {n}"
    with pytest.raises(DataError, match=r"row 0: subjects: must name .* got 1 for 2 references"):
        listed(path=path, reference_subjects=("text",), **columns)


def test_a_folder_of_pictures_and_their_metadata(tmp_path: Path) -> None:
    for n in range(4):
        paint(tmp_path / "set" / f"{n}.png")
    rows = [{"file_name": f"{n}.png", "caption": f"thing {n}"} for n in range(4)]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = listed(path=str(tmp_path / "set"), held_out=0.3)
    assert source.training(0, 1)[0].references[0][:, 0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("change", "fields", "error", "message"),
    [
        ({"mask": picture(1, (40, 48), "L")}, SYNCD, DataError, r"row 1: mask: must match"),
        ({"mask": None}, SYNCD, DataError, r"row 1: mask: must match the references"),
        ({"image": {"bytes": b"x", "path": None}}, {}, DataError, r"row 1: image is not a read"),
        ({"image": picture(1, (8, 8))}, {}, DataError, r"row 1: image must be at least 32 px"),
        ({}, {"caption": "text"}, DataError, r"must have the columns \['text', 'image'\], misses"),
        ({}, {"references": ("file_name",)}, DataError, "file_name: must hold pictures"),
        ({}, {"caption": "number"}, DataError, r"number: must hold texts or lists of them, got V"),
        ({}, {"reference_subjects": ("number",)}, DataError, "number: must hold texts or lists"),
        ({}, {"subject": "number"}, DataError, r"number: must hold texts, got Value\('int64'\); "),
        ({}, {"split": "test"}, ConfigError, "path: must be a hub id or a folder"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, change: dict[str, Any], fields: dict[str, Any], error: type, message: str
) -> None:
    rows = [syncd_row(n, number=n, **(change if n == 1 else {})) for n in range(3)]
    path = write(tmp_path / "set", rows, number=datasets.Value("int64"))
    with pytest.raises(error, match=message) as caught:
        HfConfig(path=path, **fields).build(0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [ImportError, RuntimeError, OSError])
def test_whatever_the_hub_s_client_raises_is_a_line(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """Behind a proxy socks5:// it lacks a package, which is an ImportError."""

    def refuse(*_: Any, **__: Any) -> None:
        raise kind("Using SOCKS proxy,\nbut the package is not installed")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConfigError, match="got 'owner/name': Using SOCKS proxy, but the package"):
        HfConfig(path="owner/name").build(0)


def test_a_set_of_one_row_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must have two rows or subjects at least"):
        listed(path=write(tmp_path / "one", [syncd_row(0)]))
    with pytest.raises(DataError, match="must have a row with a caption and a picture"):
        listed(path=write(tmp_path / "none", [syncd_row(0, caption=None)]))


def stream(path: str, **fields: Any) -> StreamedSource:
    source = HfConfig(path=path, streaming=True, **SYNCD, **fields).build(3)
    assert isinstance(source, StreamedSource)
    return source


@pytest.fixture
def blocks_of_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "BLOCK", 8)


@pytest.mark.usefixtures("blocks_of_8")
def test_a_stream_shows_every_row_and_goes_on_where_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "set", [syncd_row(n) for n in range(24)])
    source = stream(path, held_out=0.15)
    passes = [source.training(rollout, 4) for rollout in range(18)]  # three passes of 6 rollouts
    shown = [number(e.prompt) for batch in passes for e in batch]
    kept = {number(e.prompt) for e in source.held_out(99)}
    kept |= {number(e.prompt) for e in source.validation(99)}
    assert kept
    assert set(shown) == set(range(24)) - kept
    assert len({e.prompt for batch in passes for e in batch}) > 24 - len(kept)  # other lines
    # In any order, of a source that begins anew.
    other = stream(path, held_out=0.15)
    for rollout in (4, 17, 0, 9, 5):
        again = other.training(rollout, 4)
        assert [e.id for e in again] == [e.id for e in passes[rollout]]
        assert all(
            torch.equal(a.references[0], b.references[0])
            for a, b in zip(again, passes[rollout], strict=True)
        )


@pytest.mark.usefixtures("blocks_of_8")
def test_a_streamed_block_shows_its_rows_equally_often(tmp_path: Path) -> None:
    source = stream(write(tmp_path / "set", [syncd_row(n) for n in range(8)]), held_out=1e-9)
    counts = Counter(number(e.prompt) for r in range(4) for e in source.training(r, 4))
    assert counts == dict.fromkeys(range(8), 2)
    with pytest.raises(ConfigError, match="held_out: must leave rows for held_out, got none"):
        source.held_out(1)


def test_what_of_a_stream_is_used_and_what_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [syncd_row(n) for n in range(9)] + [syncd_row(9, caption="a thing on a desk " * 9)]
    rows.append(syncd_row(10, caption=" "))
    data = {"type": "customized_grpo.data.hf:HfConfig", "path": write(tmp_path / "set", rows)}
    data |= {"streaming": True, "held_out": 1e-9, "masks": ["mask"]}
    raw = yaml.safe_load((ROOT / "configs" / "emoji.yaml").read_text("utf-8"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw | {"data": data}))
    command = ["data", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "sheet.png")]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "examples: streamed, and not counted",
        "rows 0 to 10 of the stream: 10 are trained on",
        "1 rows not used: no text in the column caption",
    ]
    assert lines[3].startswith("generator: reads 30 tokens of a prompt; 1 of 10 prompts are longer")
    assert "first batch:" in lines


def test_streamed_splits_are_by_subject_and_the_first_are_the_same(tmp_path: Path) -> None:
    rows = [syncd_row(n, file_name=f"item {n % 9}") for n in range(36)]
    path = write(tmp_path / "set", rows)
    source = stream(path, held_out=0.3, subject="file_name")
    parts = [source.held_out(99), source.validation(99), source.training(0, 36)]
    items = [{e.subject for e in part} for part in parts]
    assert sum(map(len, items)) == len(set.union(*items)) == 9
    assert [e.id for e in source.held_out(2)] == [e.id for e in parts[0][:2]]
    assert not source.listed()


def test_a_stream_without_a_row_to_train_on_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "set", [syncd_row(n, caption=None) for n in range(3)])
    with pytest.raises(DataError, match="streaming: must find a row to train on, got none"):
        stream(path).training(0, 2)


@pytest.mark.slow
def test_a_run_trains_on_a_stream(tmp_path: Path, tiny_config: RunConfig) -> None:
    path = write(tmp_path / "set", [syncd_row(n) for n in range(20)])
    data = HfConfig(path=path, streaming=True, held_out=0.2, **SYNCD)  # pyright: ignore
    tiny = changed(tiny_config, train={"num_updates": 1}, rollout={"group_size": 2})
    run = train(dataclasses.replace(tiny, data=data))
    (row,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert math.isfinite(row["reward/dinov2/mean"])
