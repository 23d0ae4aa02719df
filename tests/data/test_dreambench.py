"""On a folder in the published form, and on the dataset itself where it lies."""

from collections import Counter
from pathlib import Path

import pytest
from pictures import DREAMBENCH, on_the_dataset, paint

from customized_grpo.data.dreambench import HELD_OUT, DreamBenchConfig, read_subjects
from customized_grpo.errors import ConfigError, DataError


def write_dataset(folder: Path) -> Path:
    """Two toys and a dog in the published form, with prompts of our own."""
    for name in ("robot", "blocks", "dog3"):
        for i in range(2):
            paint(folder / name / f"0{i}.jpg")
    call = ".format(unique_token, class_token)"
    lines = ["Classes", "", "subject_name,class", "robot,toy", "blocks,toy", "dog3,dog", ""]
    for heading, verb in (("Object", "stands"), ("Live Subject", "runs")):
        lines += ["Prompts", "", f"{heading} Prompts", "", "prompt_list = ["]
        lines += [f"'a {{0}} {{1}} {verb} at {i} o\\'clock'{call}," for i in range(9)]
        lines += [f"'a {{0}} {{1}} {verb} at noon'{call}", "]", ""]
    (folder / "prompts_and_classes.txt").write_text("\n".join(lines))
    return folder


def test_a_folder_in_the_published_form(tmp_path: Path) -> None:
    config = DreamBenchConfig(path=str(write_dataset(tmp_path)), held_out=("robot",))
    splits = config.build(seed=0).splits
    assert (len(splits.training), len(splits.held_out), len(splits.validation)) == (32, 20, 8)
    assert {e.id.split("/")[0] for e in splits.held_out} == {"robot"}
    assert {e.subject for e in splits.training} == {"toy", "dog"}
    assert "a toy stands at noon" in {e.prompt for e in splits.held_out}
    (tmp_path / "mug").mkdir()
    assert config.build(seed=0).remarks[3:] == [
        "mug not used: prompts_and_classes.txt does not name it"
    ]
    running = {e.subject for e in (*splits.training, *splits.validation) if " runs " in e.prompt}
    assert running == {"dog"}


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"path: must be a folder with prompts_and_classes\.txt"):
        DreamBenchConfig(path=str(tmp_path)).build(seed=0)
    folder = str(write_dataset(tmp_path))
    with pytest.raises(ConfigError, match=r"held_out: must name.*'robots'; did you mean 'robot'"):
        DreamBenchConfig(path=folder, held_out=("robots",)).build(seed=0)
    (tmp_path / "robot" / "00.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"robot/00\.jpg is not a readable picture"):
        DreamBenchConfig(path=folder, held_out=("robot",)).build(seed=0)
    for photo in (tmp_path / "robot").iterdir():
        photo.unlink()
    with pytest.raises(DataError, match="robot: must hold the photos"):
        DreamBenchConfig(path=folder, held_out=("robot",)).build(seed=0)
    (tmp_path / "prompts_and_classes.txt").write_text("Classes\n\nrobot,toy\n")
    with pytest.raises(DataError, match="must have lines 'subject,class' and two lists of prompts"):
        DreamBenchConfig(path=folder).build(seed=0)


@on_the_dataset
def test_the_dataset_has_30_subjects_of_two_kinds_with_25_prompts() -> None:
    subjects = read_subjects(DREAMBENCH)
    assert len(subjects) == 30
    assert sum(len(s.photos) for s in subjects) == 158
    assert all(len(s.templates) == 25 for s in subjects)
    assert len({s.templates for s in subjects}) == 2
    live = {s.name for s in subjects if any("wearing" in t for t in s.templates)}
    assert live == {"cat", "cat2", "dog", "dog2", "dog3", "dog5", "dog6", "dog7", "dog8"}
    assert all(t.count("{subject}") == 1 and "{0}" not in t for s in subjects for t in s.templates)


@on_the_dataset
def test_the_dataset_is_split_by_subject() -> None:
    source = DreamBenchConfig(path=str(DREAMBENCH)).build(seed=0)
    splits = source.splits
    total = len(splits.training) + len(splits.held_out) + len(splits.validation)
    assert total == 158 * 25
    assert {e.id.split("/")[0] for e in splits.held_out} == set(HELD_OUT)
    assert not {e.id.split("/")[0] for e in splits.training} & set(HELD_OUT)
    shown = Counter(e.id.split("/")[0] for e in splits.held_out[:60])
    assert set(shown) == set(HELD_OUT)
    (example,) = source.training(0, 1)
    assert example.references[0].shape == (3, 512, 512)
    assert example.references[0].std() > 0.05
    assert example.prompt.endswith(tuple("abcdefghijklmnopqrstuvwxyz"))
    assert example.subject in example.prompt
