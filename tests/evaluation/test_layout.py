"""Pictures of other people's scripts: read where they lie, or a manifest is written for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from worlds import config_of, smooth, write_jsonl, write_png

from customized_grpo.cli.main import main
from customized_grpo.config import JsonlSet
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.evaluation.items import BenchmarkSet
from customized_grpo.evaluation.manifest import MANIFEST, read_outputs, write_wanted
from customized_grpo.evaluation.sets import build_set


@pytest.fixture
def wanted(tmp_path: Path) -> BenchmarkSet:
    return build_set(JsonlSet(path=str(write_jsonl(tmp_path))), num_images=2)


def lay_out(folder: Path, wanted: BenchmarkSet, between: str = "_", ending: str = "png") -> Path:
    """As DreamBooth repositories do: SUBJECT/PROMPT/SEED.png, the seeds 9, 10."""
    for row, item in enumerate(wanted.items):
        place = folder / item.subject / item.prompt.replace(" ", between)
        write_png(place / f"{9 + item.index}.{ending}", smooth(row))
    return folder


@pytest.mark.parametrize("between", ["_", " ", "-", "__"])
def test_folders_of_subjects_and_prompts_need_no_manifest(
    tmp_path: Path, wanted: BenchmarkSet, between: str
) -> None:
    folder = lay_out(tmp_path / "out", wanted, between)
    found = read_outputs(folder, wanted)
    assert found.items == wanted.items
    for item, photo in zip(found.items, found.photos, strict=True):
        assert photo.name.startswith(f"{item.subject}/")
        assert photo.name.endswith(f"/{9 + item.index}.png")  # 9 before 10


def test_what_is_missing_or_too_many_is_named(tmp_path: Path, wanted: BenchmarkSet) -> None:
    folder = lay_out(tmp_path / "out", wanted)
    with pytest.raises(DataError, match=r"must hold pictures of the benchmark's .* got 9 others"):
        read_outputs(folder, build_set(JsonlSet(path=str(tmp_path / "prompts.jsonl")), 1))
    write_png(folder / "rex" / "a_dog_on_mars" / "0.png", smooth(1))
    with pytest.raises(DataError, match=r"got 1 others: rex/a_dog_on_mars/0\.png; remove them"):
        read_outputs(folder, wanted)
    (folder / "rex" / "a_dog_on_mars" / "0.png").unlink()
    next((folder / "rex").rglob("10.png")).unlink()
    with pytest.raises(DataError, match=r"1 of 18 pictures are missing"):
        read_outputs(folder, wanted)
    assert len(read_outputs(folder, wanted, allow_partial=True).items) == 17
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"SUBJECT/PROMPT/SEED\.png, got .*--write-manifest"):
        read_outputs(tmp_path / "empty", wanted)


def test_a_manifest_is_written_for_what_is_there_and_what_is_not(
    tmp_path: Path, wanted: BenchmarkSet
) -> None:
    folder = lay_out(tmp_path / "out", wanted)
    expected = read_outputs(folder, wanted)
    file, count = write_wanted(folder, wanted)
    assert count == len(wanted.items)
    found = read_outputs(folder, wanted)  # by the manifest now
    assert [p.name for p in found.photos] == [p.name for p in expected.photos]
    with pytest.raises(ConfigError, match="is there already"):
        write_wanted(folder, wanted)
    file.unlink()

    new = tmp_path / "new"
    file, count = write_wanted(new, wanted)
    assert count == 0
    for row, line in enumerate(file.read_text("utf-8").splitlines()):
        write_png(new / json.loads(line)["file"], smooth(row))  # as a script would
    assert read_outputs(new, wanted).items == wanted.items
    file.unlink()
    assert read_outputs(new, wanted).items == wanted.items  # it is laid out as one reads it


def ask(folder: Path, *prompts: tuple[str, str], num_images: int = 1) -> BenchmarkSet:
    """Prompts of one subject, each with its reference."""
    write_jsonl(folder)
    for _, name in prompts:
        write_png(folder / name, smooth(7))
    rows = [{"subject": "rex", "prompt": p, "references": [name]} for p, name in prompts]
    file = folder / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_set(JsonlSet(path=str(file)), num_images)


def lines(folder: Path) -> list[str]:
    return [json.loads(line)["file"] for line in (folder / MANIFEST).read_text().splitlines()]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([("a dog", "rex/0.png"), ("a dog", "rex/1.png")], "must have a manifest where a prompt"),
        ([("a dog", "rex/0.png"), ("a dog!", "rex/0.png")], "a_dog: must be of one prompt, got tw"),
    ],
)
def test_what_no_name_tells_apart_needs_a_manifest_which_is_written(
    tmp_path: Path, prompts: list[tuple[str, str]], message: str
) -> None:
    wanted, folder = ask(tmp_path, *prompts), tmp_path / "out"
    for n in range(2):
        write_png(folder / "rex" / "a_dog" / f"{n}.png", smooth(n))
    with pytest.raises(DataError, match=f"{message}.*; see --write-manifest"):
        read_outputs(folder, wanted)
    _, count = write_wanted(folder, wanted)
    assert count == 0
    for n, name in enumerate(lines(folder)):
        write_png(folder / name, smooth(n))
    assert read_outputs(folder, wanted).items == wanted.items


def test_every_line_of_a_manifest_has_a_file_of_its_own(tmp_path: Path) -> None:
    long = "a dog " * 20
    prompts = [(f"{long}here", "rex/0.png"), (f"{long}there", "rex/0.png"), ("a cat", "rex/0.png")]
    prompts += [("a dog", "rex/0.png"), ("A dog!", "rex/0.png")]
    prompts += [("a mug", "front/1.png"), ("a mug", "side/1.png")]
    wanted, folder = ask(tmp_path, *prompts, num_images=2), tmp_path / "out"
    write_wanted(folder, wanted)
    names = lines(folder)
    assert len({name.casefold() for name in names}) == len(names) == 14
    assert names[4] == "rex/a_cat/0-0.png"  # no longer than it has to be
    assert names[12].endswith("/side/1.png-0.png")
    for n, name in enumerate(names):
        write_png(folder / name, smooth(n))
    assert read_outputs(folder, wanted).items == wanted.items


def test_a_picture_that_is_there_is_not_expected_for_another_line(tmp_path: Path) -> None:
    wanted, folder = ask(tmp_path, ("a cat", "rex/0.png"), num_images=2), tmp_path / "out"
    write_png(folder / "rex" / "a_cat" / "0-1.png", smooth(1))
    assert write_wanted(folder, wanted)[1] == 1
    assert lines(folder) == ["rex/a_cat/0-1.png", "rex/a_cat_0/rex/0.png-1.png"]


def test_the_command(
    tmp_path: Path, wanted: BenchmarkSet, capsys: pytest.CaptureFixture[str]
) -> None:
    metric = {"type": "clip-text", "objective": "prompt", "path": "embedded:evaluator-clip"}
    config = config_of(tmp_path, [metric], num_images=2)
    file = tmp_path / "benchmark.yaml"
    raw = {
        "name": "test",
        "benchmark": {"type": "jsonl", "path": config.benchmark.path},
        "num_images": 2,
        "images": str(tmp_path / "out"),
        "metrics": [metric],
    }
    file.write_text(json.dumps(raw))
    assert main(["evaluate", str(file), "--write-manifest"]) == 0
    out = capsys.readouterr().out
    assert out == f"manifest: {tmp_path / 'out' / MANIFEST} (0 of 18 pictures are there)\n"
    assert main(["evaluate", str(file), "--write-manifest"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), "--write-manifest"]) == 2
    assert "has no effect on a run" in capsys.readouterr().err
