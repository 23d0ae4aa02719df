"""What is asked for: DreamBench where it lies, the emoji world, a JSONL file; mistakes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from data.pictures import DREAMBENCH, on_the_dataset
from worlds import write_jsonl

from customized_grpo.config import DreamBenchSet, EmojiSet, JsonlSet
from customized_grpo.data.dreambench import UNO_REFERENCES
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.evaluation.items import BenchmarkSet
from customized_grpo.evaluation.sets import build_set, category_of


def dreambench(**fields: object) -> BenchmarkSet:
    return build_set(DreamBenchSet(path=str(DREAMBENCH), **fields), num_images=1)  # type: ignore


@on_the_dataset
def test_dreambench_is_30_subjects_158_photos_and_750_prompts() -> None:
    found = dreambench()
    counts = {"subjects": 30, "photos": 158, "prompts": 750, "images": 750}
    assert found.counts() == counts
    assert len({subject.words for subject in found.subjects.values()}) == 15
    kinds = Counter(subject.kind for subject in found.subjects.values())
    assert kinds == {"object": 21, "live": 9}
    assert Counter((i.kind, i.category) for i in found.items) == {
        ("object", "context"): 20 * 21, ("object", "property"): 5 * 21,
        ("live", "context"): 10 * 9, ("live", "accessory"): 10 * 9, ("live", "property"): 5 * 9,
    }  # fmt: skip
    for item in found.items:
        words = found.subjects[item.subject].words
        assert f" {words}" in item.prompt  # the class, and no token before it
        assert "{" not in item.prompt
        first = sorted(photo.name for photo in found.subjects[item.subject].photos)[0]
        assert item.references == (first,)


@on_the_dataset
def test_the_reference_is_a_rule() -> None:
    named = dreambench(reference={"backpack": "02.jpg"})
    shown = {item.subject: item.references[0] for item in named.items}
    assert (shown["backpack"], shown["cat"]) == ("02.jpg", "00.jpg")
    assert named.digest != dreambench().digest
    every = dreambench(reference="all")
    assert every.counts()["images"] == 158 * 25
    assert len({item.key for item in every.items}) == 158 * 25
    uno = dreambench(reference="uno")
    chosen = {item.subject: item.references[0] for item in uno.items}
    assert chosen == UNO_REFERENCES  # of all subjects: none keeps its first for want of a name
    assert chosen["dog5"] == "00.jpg"
    assert chosen["dog3"] == "05.jpg"
    assert Counter(chosen.values())["02.jpg"] == 11
    assert uno.rules["reference"] == "the one in UNO's list"
    with pytest.raises(ConfigError, match=r"reference: must name subjects, got 'backpak'; did you"):
        dreambench(reference={"backpak": "02.jpg"})
    with pytest.raises(ConfigError, match=r"reference\.cat: must be a photo of it, got '9\.jpg'"):
        dreambench(reference={"cat": "9.jpg"})


def test_categories_are_read_off_the_template() -> None:
    assert category_of("a red {subject}") == "property"
    assert category_of("a cube shaped {subject}") == "property"
    assert category_of("a {subject} in a police outfit") == "accessory"
    assert category_of("a {subject} wearing pink glasses") == "accessory"
    assert category_of("a {subject} on top of pink fabric") == "context"


def test_noise_depends_on_subject_prompt_and_index_only(tmp_path: Path) -> None:
    found = build_set(JsonlSet(path=str(write_jsonl(tmp_path))), num_images=3)
    seeds = {item.noise_seed(0) for item in found.items}
    assert len(seeds) == len(found.items) == 27
    item = found.items[4]
    assert item.noise_seed(0) == replace(item, prompt="other", references=("x",)).noise_seed(0)
    assert item.noise_seed(0) != item.noise_seed(1)
    # The same on every machine, and for everyone.
    assert found.items[0].noise_seed(0) == 5_187_820_394_935_638_269


def test_the_emoji_set_is_the_same_for_everyone() -> None:
    one, two = (build_set(EmojiSet(num_examples=24), num_images=1) for _ in range(2))
    assert one.digest == two.digest
    assert one.counts()["photos"] == 24 + 3 * one.counts()["subjects"]
    assert {item.category for item in one.items} == {"context", "property", "accessory", "combined"}
    assert all(photo.mask is not None for photo in one.photos)


def test_a_file_of_your_own(tmp_path: Path) -> None:
    found = build_set(JsonlSet(path=str(write_jsonl(tmp_path))), num_images=2)
    assert found.counts() == {"subjects": 3, "photos": 6, "prompts": 9, "images": 18}
    assert found.subjects["rex"].words == "dog"
    item = found.items[2]
    assert (item.subject, item.prompt_index, item.prompt) == ("rex", 1, "a red dog")
    assert (item.category, item.kind) == ("property", "live")
    assert found.reference_rows(item) == [0]
    assert found.subject_rows("mug") == [3, 4]


ROW = {"subject": "rex", "prompt": "a dog", "references": ["rex/0.png"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "refs": 1}, r"unknown key 'refs'; known are subject, prompt"),
        ({**ROW, "prompt": " "}, r"prompt: must be a non-empty string"),
        ({**ROW, "references": []}, r"references: must be a list of at least one path"),
        ({**ROW, "photos": ["../x.png"]}, r"photos: must stay in the folder"),
        ({**ROW, "references": ["none.png"]}, r"none\.png is not a readable picture"),
        (
            {**ROW, "class": "cat"},
            r"class: must be the same on all lines of 'rex'.*'cat' and 'dog'",
        ),
        (
            {"subject": "rex", "prompt": "x", "references": ["./rex/0.png"]},
            r"references: must be written plainly, got '\./rex/0\.png'; write 'rex/0\.png'",
        ),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, row: dict, message: str) -> None:
    file = write_jsonl(tmp_path)
    file.write_text(file.read_text() + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        build_set(JsonlSet(path=str(file)), num_images=1)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"benchmark\.path: must be a folder with prompts_and_"):
        build_set(DreamBenchSet(path=str(tmp_path)), num_images=1)
    with pytest.raises(DataError, match=r"benchmark\.path: .*x\.jsonl: cannot be read"):
        build_set(JsonlSet(path=str(tmp_path / "x.jsonl")), num_images=1)
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(DataError, match="must hold at least one prompt, got none"):
        build_set(JsonlSet(path=str(tmp_path / "x.jsonl")), num_images=1)


@on_the_dataset
def test_a_missing_subject_and_a_broken_photo_are_named(tmp_path: Path) -> None:
    copy = tmp_path / "dataset"
    copy.mkdir()
    for path in DREAMBENCH.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "cat").unlink()
    with pytest.raises(DataError, match="cat: must hold the photos of a subject"):
        build_set(DreamBenchSet(path=str(copy)), num_images=1)
    (copy / "cat").mkdir()
    (copy / "cat" / "00.jpg").write_bytes((DREAMBENCH / "cat" / "00.jpg").read_bytes()[:2000])
    with pytest.raises(DataError, match=r"cat/00\.jpg is not a readable picture"):
        build_set(DreamBenchSet(path=str(copy)), num_images=1)
