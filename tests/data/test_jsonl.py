import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from customized_grpo.data.emoji.source import EmojiConfig
from customized_grpo.data.emoji.world import EmojiWorld
from customized_grpo.data.jsonl import JsonlConfig, read_entries
from customized_grpo.data.listed import ListedSource, Splits
from customized_grpo.errors import ConfigError, DataError


def write_rows(folder: Path, *rows: dict, name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, shade in enumerate((40, 200)):
        Image.new("RGB", (48, 40), (shade, 0, 0)).save(tmp_path / f"{number}.png")
    Image.new("L", (48, 40), 255).save(tmp_path / "mask.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    return tmp_path


def read_examples(path: Path):
    entries = read_entries(path)
    return ListedSource(Splits(training=entries, held_out=entries), 0, "").held_out(99)


GOOD = {"prompt": "a dog", "references": ["0.png"], "subject": "dog"}


def test_reads_examples_with_masks(folder: Path) -> None:
    path = write_rows(folder, GOOD | {"masks": ["mask.png"], "id": "one"}, GOOD)
    first, second = read_examples(path)
    assert (first.id, first.prompt, first.subject) == ("one", "a dog", "dog")
    assert first.references[0].shape == (3, 40, 48)
    assert first.references[0][0].unique().item() == pytest.approx(40 / 255)
    assert first.reference_masks is not None
    assert torch.equal(first.reference_masks[0], torch.ones(1, 40, 48))
    assert second.reference_masks is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": " "}, "prompt: must be a non-empty string"),
        ({"subject": None}, "subject: must be a non-empty string"),
        ({"references": []}, "references: must be a list of at least one path"),
        ({"references": ["broken.png"]}, "references: .*broken.png is not a readable picture"),
        ({"masks": ["mask.png", "mask.png"]}, "masks: must match the references"),
        ({"promt": "x"}, "unknown key 'promt'"),
        ({"subjects": ["a dog", "a cat"]}, "subjects: must name the subject of each .* 2 for 1"),
        ({"subjects": [" "]}, "subjects: must be a non-empty string"),
    ],
)
def test_mistakes_are_named(folder: Path, row: dict, message: str) -> None:
    path = write_rows(folder, GOOD, GOOD | row)
    with pytest.raises(DataError, match=message) as caught:
        read_examples(path)
    assert f"{path}:2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_subject_is_optional_and_missed_by_those_who_need_it(folder: Path) -> None:
    row = {key: value for key, value in GOOD.items() if key != "subject"}
    named, unnamed = read_examples(write_rows(folder, GOOD, row))
    assert (named.subject, named.named_subject) == ("dog", "dog")
    assert unnamed.subject == ""
    with pytest.raises(DataError, match=r"train\.jsonl:2.*subject: must say what"):
        _ = unnamed.named_subject


def test_references_may_show_several_subjects(folder: Path) -> None:
    row = {"prompt": "both on the beach", "references": ["0.png", "1.png", "1.png"]}
    both, same = read_examples(
        write_rows(
            folder,
            row | {"subjects": ["a dog", "a cat", "a cat"]},
            row | {"subjects": ["a cat"] * 3},
        )
    )
    assert (both.subject, both.subjects) == ("a dog and a cat", ("a dog", "a cat"))
    assert both.reference_subjects == ("a dog", "a cat", "a cat")
    assert (same.subject, same.reference_subjects) == ("a cat", ())


def test_one_picture_may_be_reference_and_mask(folder: Path) -> None:
    (example,) = read_examples(write_rows(folder, GOOD | {"masks": ["0.png"]}))
    assert example.reference_masks is not None
    assert example.reference_masks[0].shape == (1, 40, 48)


def test_validation_examples_are_those_of_their_own_file(folder: Path) -> None:
    files = {n: str(write_rows(folder, GOOD | {"id": n}, name=f"{n}.jsonl")) for n in "abc"}
    source = JsonlConfig(path=files["a"], held_out=files["b"], validation=files["c"]).build(seed=0)
    assert [e.id for e in source.validation(10)] == ["c"]
    without = JsonlConfig(path=files["a"], held_out=files["b"]).build(seed=0)
    with pytest.raises(ConfigError, match=r"validation: must have.*name a JSONL file"):
        without.validation(1)


def test_emoji_source_repeats_itself_and_holds_subjects_out() -> None:
    a, b = EmojiConfig().build(seed=0), EmojiConfig().build(seed=1)
    assert [e.prompt for e in a.training(2, 4)] == [e.prompt for e in a.training(2, 4)]
    assert [e.id for e in a.training(2, 4)] != [e.id for e in b.training(2, 4)]
    assert torch.equal(a.held_out(4)[3].references[0], b.held_out(4)[3].references[0])
    trained = {e.subject for i in range(8) for e in a.training(i, 64)}
    assert not trained & {e.subject for e in a.held_out(64)}
    assert {e.subject for e in a.validation(16)} <= {s.name for s in EmojiWorld("train").subjects}
    assert [e.id for e in a.validation(2)] == [e.id for e in b.validation(2)]
