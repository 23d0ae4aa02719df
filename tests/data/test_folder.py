from pathlib import Path

import pytest
from pictures import paint

from customized_grpo.data import templates
from customized_grpo.data.folder import FolderConfig
from customized_grpo.data.images import opened
from customized_grpo.data.listed import ListedSource
from customized_grpo.errors import ConfigError, DataError

TEN = tuple(f"{{subject}} in place {i}" for i in range(10))


def build(path: Path, **fields) -> ListedSource:
    return FolderConfig(path=str(path), **fields).build(seed=0)


def parts(source: ListedSource):
    splits = source.splits
    return splits.training, splits.held_out, splits.validation


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for name in ("rex", "tom_cat", "mug", "hat", "owl"):
        for i in range(3):
            paint(tmp_path / "pets" / name / f"{i}.jpg")
    (tmp_path / "pets" / "rex" / "subject.txt").write_text("a corgi\n")
    return tmp_path / "pets"


def test_photos_times_templates(pets: Path) -> None:
    training, held_out, validation = parts(build(pets, templates=TEN))
    assert len(training) == 4 * 3 * 8  # one of five subjects held out, two templates kept apart
    assert len(validation) == 4 * 3 * 2
    assert len(held_out) == 3 * 10
    assert len({e.id for e in (*training, *held_out, *validation)}) == 5 * 3 * 10


def test_held_out_are_other_subjects_and_validation_other_prompts(pets: Path) -> None:
    training, held_out, validation = parts(build(pets, templates=TEN, held_out=("mug", "hat")))
    assert {e.id.split("/")[0] for e in held_out} == {"mug", "hat"}
    assert {e.id.split("/")[0] for e in training} == {"rex", "tom_cat", "owl"}
    trained = {e.prompt.replace(e.subject, "{subject}") for e in training}
    kept = {e.prompt.replace(e.subject, "{subject}") for e in validation}
    assert not trained & kept
    assert trained | kept == set(TEN)
    assert len({e.id.split("/")[0] for e in held_out[:4]}) == 2  # the first few show them all


def test_subjects_are_called_by_their_file_or_folder(pets: Path) -> None:
    prompts = {e.prompt for part in parts(build(pets, templates=TEN)) for e in part}
    assert {"a corgi in place 3", "tom cat in place 3", "mug in place 3"} <= prompts


def test_one_subject_is_split_by_prompts(tmp_path: Path) -> None:
    for i in range(4):
        paint(tmp_path / "rex" / f"{i}.png")
    training, held_out, validation = parts(build(tmp_path / "rex", templates=TEN))
    prompts = [{e.prompt for e in part} for part in (training, held_out, validation)]
    assert [len(p) for p in prompts] == [6, 2, 2]
    assert len(set.union(*prompts)) == 10
    assert len(training) == 4 * 6
    assert training[0].subject == "rex"


def test_the_split_does_not_depend_on_the_order_of_templates(pets: Path) -> None:
    one, other = build(pets, templates=TEN), build(pets, templates=TEN[::-1])
    for a, b in zip(parts(one), parts(other), strict=True):
        assert {e.id for e in a} == {e.id for e in b}
    assert [e.id for e in one.splits.held_out] == [e.id for e in other.splits.held_out]


def test_masks_lie_beside_the_photos(tmp_path: Path) -> None:
    for i in range(2):
        paint(tmp_path / "rex" / f"{i}.jpg", (60, 40))
        paint(tmp_path / "rex" / f"{i}.mask.png", (60, 40), color=255)
    source = build(tmp_path / "rex", templates=TEN)
    (example,) = source.training(0, 1)
    assert example.reference_masks is not None
    assert example.reference_masks[0].shape == (1, 40, 60)
    assert example.reference_masks[0].unique().tolist() == [1]
    (tmp_path / "rex" / "1.mask.png").unlink()
    with pytest.raises(DataError, match=r"1\.jpg: must have a mask 1\.mask\.png"):
        build(tmp_path / "rex", templates=TEN)
    paint(tmp_path / "rex" / "1.mask.png", (40, 60), color=255)
    with pytest.raises(DataError, match=r"rex: masks: must match .* got others for 1\.jpg"):
        build(tmp_path / "rex", templates=TEN)


def test_several_references_are_the_next_photos(pets: Path) -> None:
    source = build(pets, templates=TEN, num_references=2)
    entry = next(e for e in source.splits.training if "/2.jpg/" in e.id)
    names = [picture.path.name for picture in entry.references]  # pyright: ignore
    assert names == ["2.jpg", "0.jpg"]
    assert all(len(e.references) == 2 for e in source.training(0, 4))
    with pytest.raises(DataError, match="must have at least num_references = 4 photos, got 3"):
        build(pets, templates=TEN, num_references=4)


def test_subjects_may_be_shown_in_one_picture(pets: Path) -> None:
    source = build(pets, templates=TEN, together=(("rex", "tom_cat"),), num_references=2)
    training, held_out, validation = parts(source)
    both = [e for e in (*training, *validation) if e.reference_subjects]
    assert len({e.id for e in both}) == len(both) == 3 * 10
    assert {e.prompt for e in both} == {f"a corgi and tom cat in place {i}" for i in range(10)}
    for entry in both:
        assert entry.subject == "a corgi and tom cat"
        assert entry.reference_subjects == ("a corgi", "a corgi", "tom cat", "tom cat")
        folders = [p.path.parent.name for p in entry.references]  # pyright: ignore
        assert folders == ["rex", "rex", "tom_cat", "tom_cat"]
    assert {e.id.split("/")[0] for e in held_out} < {"mug", "hat", "owl"}
    assert any(line.startswith("rex+tom_cat ('a corgi and tom cat'): ") for line in source.remarks)


def test_where_all_are_together_prompts_are_held_out(pets: Path) -> None:
    names = ("rex", "tom_cat", "mug", "hat", "owl")
    prompts = []
    for part in parts(build(pets, templates=TEN, together=(names,))):
        prompts.append({e.prompt.split(" in place ")[1] for e in part})
        assert any(len(e.references) == 5 for e in part)
    assert [len(some) for some in prompts] == [6, 2, 2]
    assert len(set.union(*prompts)) == 10


def test_templates_from_a_file(pets: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("\n".join((*TEN, "", TEN[0])))
    assert [e.id for e in build(pets, templates=str(file)).splits.training] == [
        e.id for e in build(pets, templates=TEN).splits.training
    ]


def test_live_subjects_get_prompts_of_their_own(pets: Path) -> None:
    source = build(pets, live=("rex",), held_out=("rex", "mug"))
    prompts = {"rex": set(), "mug": set()}
    for entry in source.splits.held_out:
        prompts[entry.id.split("/")[0]].add(entry.id.split("/")[2])
    assert prompts["rex"] == set(templates.LIVE)
    assert prompts["mug"] == set(templates.INANIMATE)


@pytest.mark.parametrize("name", ["LIVE", "INANIMATE"])
def test_built_in_templates_are_our_own_25(name: str) -> None:
    lines = getattr(templates, name)
    assert len(set(lines)) == 25
    assert templates.read_templates(lines) == lines


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"path": "nowhere"}, ConfigError, "path: must be a folder"),
        ({"live": ("rexx",)}, ConfigError, "live: must name.*'rexx'; did you mean 'rex'"),
        ({"live": ("REX",)}, ConfigError, "got 'REX'; 'rex' differs in case or accents only; copy"),
        ({"held_out": ("rexx",)}, ConfigError, "held_out: must name.*did you mean 'rex'"),
        ({"together": (("rex", "rexx"),)}, ConfigError, "together: must name.*did you mean 'rex'"),
        ({"together": (("rex", "rex"),)}, ConfigError, "must be subjects of different words, got"),
        ({"held_out": ()}, DataError, "held_out: must leave something to train on"),
        (
            {"held_out": ("rex", "tom_cat", "mug", "hat", "owl")},
            DataError,
            "held_out: must leave something to train on",
        ),
        ({"templates": ()}, DataError, "templates: must hold at least one"),
        ({"templates": ("a dog",)}, DataError, "must have {subject} in it, got 'a dog'"),
        ({"templates": ("a {subject}", "{subject} {class}")}, DataError, "got '{class}' in '{subj"),
        ({"templates": "none.txt"}, DataError, "templates: none.txt: cannot be read"),
    ],
)
def test_mistakes_are_named(pets: Path, fields: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        FolderConfig(**({"path": str(pets)} | fields)).build(seed=0)
    assert "\n" not in str(caught.value)


def test_folders_that_are_not_as_described_are_refused(pets: Path) -> None:
    paint(pets / "loose.jpg")
    with pytest.raises(DataError, match=r"photos or sub-folders, got both, such as loose\.jpg"):
        build(pets)
    (pets / "loose.jpg").rename(pets / "rex" / "3.jpg")
    (pets / "empty").mkdir()
    with pytest.raises(DataError, match="empty: must hold at least one photo"):
        build(pets)
    (pets / "empty").rmdir()
    (pets / "mug" / "subject.txt").write_text("a mug\nlive\n")
    with pytest.raises(DataError, match=r"subject\.txt: must hold one line"):
        build(pets)
    (pets / "mug" / "subject.txt").unlink()
    (pets / "owl" / "0.jpg").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"owl/0\.jpg is not a readable picture"):
        build(pets)


def test_a_picture_that_is_not_there_names_those_beside_it(pets: Path) -> None:
    with pytest.raises(DataError, match=r"not there; check the path; its folder has 0\.jpg, 1\.j"):
        opened(pets / "rex" / "front.jpg", "--reference")
