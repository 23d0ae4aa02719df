"""JSONL rows: examples inside of the data folder, or one line that names file, line and field."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fuzzing import break_bytes, examples, planted, refused_or
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from customized_grpo.data.folder import FolderConfig
from customized_grpo.data.jsonl import JsonlConfig, read_entries
from customized_grpo.data.listed import Entry
from customized_grpo.data.syncd import SynCDConfig
from customized_grpo.errors import CustomizedGRPOError, DataError

NAMES = [
    "a.png", "b.png", "sub/c.png", "./a.png", "sub/../a.png", "mask.png", "wide.png", "tiny.png",
    "../outside.png", "../../etc/passwd", "/etc/passwd", "/dev/zero", "/dev/stdin", "loop", "pipe",
    "sub", "", ".", "..", "a\0.png", "none.png", "text.png", "pickle.png", "x" * 300, "a" * 5000,
    "\ud800.png", "~/a.png", "http://host/a.png", "a.png/", "sub/loop/a.png", "dangling",
]  # fmt: skip
GOOD = {"id": "one", "prompt": "a dog", "references": ["a.png"], "masks": ["mask.png"]}
KEYS = ("id", "prompt", "references", "masks", "subject", "promt", "")
VALUES = [
    float("nan"), float("inf"), -float("inf"), 10**30, "\0", "\ud800", " ", "a\u2028b", "\x85", [],
    [[]], {}, None, True, ["a.png"] * 3, [1], "a" * 100_000, {"a": {"b": []}},
]  # fmt: skip
TEXTS = [
    "", "null", "[]", "1" * 5000, '{"a": 1, "a": 2}', "{" * 3000, '{"a":' * 3000, "[" * 100_000,
    '{"id": NaN}', '{"prompt": "a" "b"}', "\ufeff{}", "//", '"\\ud800"', "{'a': 1}", "\r", "\0",
]  # fmt: skip

values = st.sampled_from(VALUES) | st.text(max_size=8) | st.integers() | st.floats()
paths = st.lists(st.sampled_from(NAMES) | st.text(max_size=8), max_size=3)


@st.composite
def rows(draw: st.DrawFn) -> bytes:
    """A row with up to three changes, or none of JSON; some have broken bytes."""
    row: dict[str, Any] = dict(GOOD)
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=3)):
        if draw(st.integers(0, 5)) == 0:
            row.pop(key, None)
        else:
            row[key] = draw(paths if key in ("references", "masks") else values)
    text = json.dumps(row, ensure_ascii=draw(st.booleans()))
    if draw(st.integers(0, 9)) == 0:
        text = draw(st.sampled_from(TEXTS))
    content = text.encode("utf-8", "surrogatepass")
    return break_bytes(draw, content) if draw(st.integers(0, 4)) == 0 else content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "inside"
    (folder / "sub").mkdir(parents=True)
    sizes = {"a": (40, 32), "b": (64, 64), "sub/c": (40, 32), "mask": (40, 32), "wide": (80, 32)}
    for name, size in (sizes | {"tiny": (8, 8), "../outside": (40, 32)}).items():
        Image.new("L" if name == "mask" else "RGB", size, 200).save(folder / f"{name}.png")
    (folder / "text.png").write_text("no picture")
    (folder / "pickle.png").write_bytes(planted(folder / "mark"))
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "sub" / "loop").symlink_to(folder / "sub")
    (folder / "dangling").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe")
    return folder


def read(path: Path) -> list[Entry]:
    entries = list(read_entries(path))
    for entry in entries:
        (entry.id + entry.prompt + entry.subject).encode()
        assert entry.prompt.strip()
        assert [p.load().shape[1:] for p in entry.references] == [
            (p.height, p.width) for p in entry.references
        ]
    return entries


@given(content=rows(), before=st.booleans())
@examples(full=2500, fast=200)
def test_rows(folder: Path, content: bytes, before: bool) -> None:
    file = folder / "rows.jsonl"
    good = json.dumps(GOOD | {"id": "two"}).encode() + b"\n"
    file.write_bytes(good + content if before else content)
    listing = sorted(os.listdir(folder))
    entries = refused_or("rows", lambda: read(file))
    for entry in entries or ():
        for picture in (*entry.references, *(entry.masks or ())):
            path = os.path.abspath(picture.path)  # pyright: ignore[reportAttributeAccessIssue]
            assert path.startswith(f"{folder}{os.sep}")
    assert sorted(os.listdir(folder)) == listing
    assert not (folder / "mark").exists()


@given(content=rows(), item=st.sampled_from(["filenames", "ref_img"]), value=values | paths)
@examples(full=300, fast=20)
def test_metadata_of_syncd(folder: Path, content: bytes, item: str, value: Any) -> None:
    file = folder / "sets_metadata.json"
    names = value if isinstance(value, list) else ["a.png", "sub/c.png"]
    row = {item: value if item == "ref_img" else names, "prompts": value, "text": "a dog"}
    text = json.dumps([row]).encode()
    file.write_bytes(content if value is None else text)
    config = SynCDConfig(path=str(file))
    refused_or("rows", lambda: config.build(seed=0))
    file.unlink()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            '{"prompt": "a", "references": ["../outside.png"]}',
            "references: must stay in the folder",
        ),
        ('{"prompt": "a", "references": ["/etc/passwd"]}', "references: must stay in the folder"),
        ('{"prompt": "a", "references": ["sub/../../outside.png"]}', "must stay in the folder"),
        ('{"prompt": "a", "references": ["a\\u0000.png"]}', "references: must have no nul bytes"),
        ('{"prompt": "a", "references": ["loop"]}', "references: .*loop is not a readable picture"),
        ('{"prompt": "a", "references": ["pipe"]}', "pipe must be a file, got a folder, a pipe"),
        ('{"prompt": "a", "references": ["pickle.png"]}', "pickle.png is not a readable picture"),
        (
            '{"prompt": "a", "references": ["a.png"], "masks": ["pickle.png"]}',
            "masks: .*pickle.png",
        ),
        ('{"prompt": "a", "references": ["a.png"], "masks": ["wide.png"]}', "masks: must match"),
        ('{"prompt": "a\\ud800", "references": ["a.png"]}', "prompt: must be .* lone surrogates"),
        ('{"id": NaN, "prompt": "a", "references": ["a.png"]}', "is not JSON: NaN is no number"),
        ('{"id": 1.5, "prompt": "a", "references": ["a.png"]}', "id: must be a non-empty string"),
        ('{"id": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit"),
        ('{"id": 1, "id": 2}', "is not JSON: key 'id' twice"),
        ("[" * 100_000, "is not JSON: maximum recursion depth"),
    ],
    ids=lambda value: value[:40],
)
def test_findings(folder: Path, line: str, expected: str) -> None:
    file = folder / "finding.jsonl"
    file.write_text(line)
    with pytest.raises(DataError, match=rf"finding\.jsonl:1: .*{expected}") as caught:
        read_entries(file)
    assert "\n" not in str(caught.value)
    assert not (folder / "mark").exists()


def test_files_that_are_no_text_are_refused(folder: Path) -> None:
    (folder / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    for name in ("latin.jsonl", "pipe", "loop", "sub", "a\0b", "x" * 5000):
        with pytest.raises(DataError, match="cannot be read"):
            read_entries(folder / name)


def test_unicode_s_line_ends_do_not_end_a_row(folder: Path) -> None:
    file = folder / "lines.jsonl"
    file.write_text('{"prompt": "a\u2028b\x85c", "references": ["a.png"]}', encoding="utf-8")
    (entry,) = read_entries(file)
    assert entry.prompt == "a\u2028b\x85c"


def test_root_names_the_folder_that_paths_may_not_leave(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    absolute = str(folder / "a.png")
    file.write_text(json.dumps({"prompt": "a", "references": [absolute]}))
    with pytest.raises(DataError, match="or set root to a folder that holds all of them"):
        read_entries(file)
    config = JsonlConfig(path=str(file), held_out=str(file), root=str(folder))
    assert len(config.build(seed=0).splits.training) == 1
    file.write_text(json.dumps({"prompt": "a", "references": ["sub/c.png"]}))
    assert len(config.build(seed=0).splits.training) == 1


@pytest.mark.parametrize("name", ["loop.png", "pipe.png", b"\xff.png"])
def test_odd_files_among_photos_are_named(tmp_path: Path, name: str | bytes) -> None:
    photo = tmp_path / os.fsdecode(name)
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    match name:
        case "loop.png":
            photo.symlink_to(photo)
        case "pipe.png":
            os.mkfifo(photo)
        case _:
            (tmp_path / "good.png").rename(photo)
    with pytest.raises(CustomizedGRPOError) as caught:
        FolderConfig(path=str(tmp_path)).build(seed=0)
    assert ascii(photo.name)[1:-1] in ascii(str(caught.value)).replace("\\\\", "\\")
