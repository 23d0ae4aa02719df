"""Both forms of SynCD's metadata, as the code that wrote and read them has it (see data/syncd)."""

import json
from pathlib import Path

import pytest
from pictures import paint

from customized_grpo.data.syncd import SynCDConfig
from customized_grpo.errors import ConfigError, DataError


def write(file: Path, items: object) -> str:
    file.write_text(json.dumps(items))
    return str(file)


def sets(folder: Path, count: int = 4) -> list[dict]:
    """Sets of three pictures with masks, as gen_rigid.py and cal_scores.py write them."""
    items = []
    for n in range(count):
        names = [f"{n}_0_{i}.jpg" for i in range(3)]
        for i, name in enumerate(names):
            paint(folder / name, color=(80 * i, 0, 0))
            paint(folder / "masks" / name, color=255)
        items.append(
            {
                "filenames": names,
                "prompts": [f"the thing {n} in place {i}" for i in range(3)],
                "objaverse_id": f"id{n}",
                "category": "rigid",
                "dino_scores": [[0, 0.9, 0.5], [0, 0, 0.99], [0, 0, 0]],
                "aesthetics_scores": {f"{n}_0_0": 6.0, f"{n}_0_1": 5.0, f"{n}_0_2": 3.0},
            }
        )
    return items


def pairs(folder: Path) -> list[dict]:
    """As in datasets/train_1w_syncd_embedding.json of Customized-GRPO."""
    items = []
    for n in (14, 29, 34):
        paint(folder / str(n) / "0.png")
        items.append(
            {
                "id": str(3000 + n),
                "category": "rigid",
                "category_description": "a red mail box.",
                "ref_img": f"{n}/0.png",
                "img": f"{n}/1.png",
                "ref_prompt": "a red mail box next to a bin.",
                "text": f"a red mail box on road {n}.",
                "txt_save_path": "x.pt",
                "vec_save_path": "y.pt",
            }
        )
    return items


def test_every_picture_of_a_set_is_asked_for_with_another_as_reference(tmp_path: Path) -> None:
    write(tmp_path / "metadata.json", sets(tmp_path))
    splits = SynCDConfig(path=str(tmp_path), held_out=0.25).build(seed=0).splits
    assert [len(p) for p in (splits.training, splits.held_out, splits.validation)] == [6, 3, 3]
    for entry in splits.training:
        thing, place = entry.prompt.removeprefix("the thing ").split(" in place ")
        following = (int(place) + 1) % 3
        (reference,), (mask,) = entry.references, entry.masks  # pyright: ignore
        assert reference.path == tmp_path / f"{thing}_0_{following}.jpg"
        assert mask.path == tmp_path / "masks" / reference.path.name
    things = [{e.prompt.split()[2] for e in p} for p in (splits.training, splits.held_out)]
    assert not things[0] & things[1]


def test_several_references(tmp_path: Path) -> None:
    write(tmp_path / "rigid_metadata.json", sets(tmp_path))
    source = SynCDConfig(path=str(tmp_path), num_references=2).build(seed=0)
    entry = next(e for e in source.splits.training if e.prompt.endswith("place 2"))
    assert [p.path.stem[-1] for p in entry.references] == ["0", "1"]  # pyright: ignore
    with pytest.raises(DataError, match="no example is left"):
        SynCDConfig(path=str(tmp_path), num_references=3).build(seed=0)


@pytest.mark.parametrize(
    ("filters", "places"),
    [
        ({"min_aesthetics": 4.0}, {"0", "1"}),
        ({"min_dino": 0.7}, {"0", "1"}),  # 0.99 is as good as a copy
        ({"min_dino": 0.4}, {"0", "1", "2"}),
        ({"min_dino": 0.4, "min_aesthetics": 4.0}, {"0", "1"}),
    ],
)
def test_filters_by_score(tmp_path: Path, filters: dict, places: set) -> None:
    write(tmp_path / "metadata_with_scores.json", sets(tmp_path))
    splits = SynCDConfig(path=str(tmp_path), **filters).build(seed=0).splits
    entries = (*splits.training, *splits.held_out, *splits.validation)
    assert {e.prompt[-1] for e in entries} == places


def test_pairs_of_customized_grpo(tmp_path: Path) -> None:
    file = write(tmp_path / "train.json", pairs(tmp_path / "pictures"))
    config = SynCDConfig(path=file, root=str(tmp_path / "pictures"), held_out=0.3)
    splits = config.build(seed=0).splits
    (entry,) = splits.training
    assert entry.subject == "a red mail box"
    assert entry.prompt.startswith("a red mail box on road")
    assert len(splits.held_out) == len(splits.validation) == 1
    assert (config.build(seed=0).training(0, 1)[0]).references[0].shape == (3, 40, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filenames": []}, "item 1: filenames: must be a list of at least one path"),
        (
            {"filenames": ["none.jpg", "1_0_1.jpg"], "aesthetics_scores": {"none": 9, "1_0_1": 9}},
            r"item 1: picture .*none\.jpg is not a readable",
        ),
        ({"prompts": ["one"]}, "item 1: prompts: must be one per file, got 1"),
        ({"aesthetics_scores": {}}, "item 1: must have scores of every picture: KeyError"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: dict, message: str) -> None:
    items = sets(tmp_path)
    items[1] |= change
    file = write(tmp_path / "metadata.json", items)
    with pytest.raises(DataError, match=message) as caught:
        SynCDConfig(path=file, min_aesthetics=0.0).build(seed=0)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_metadata_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"path: must be a JSON file or a folder with \*metadata"):
        SynCDConfig(path=str(tmp_path)).build(seed=0)
    for content, message in (("{", "is not JSON"), ("{}", "must be a list, got dict")):
        (tmp_path / "metadata.json").write_text(content)
        with pytest.raises(DataError, match=message):
            SynCDConfig(path=str(tmp_path)).build(seed=0)
    write(tmp_path / "metadata.json", [{"a": 1}])
    with pytest.raises(DataError, match="item 0: must be an object with filenames or ref_img"):
        SynCDConfig(path=str(tmp_path)).build(seed=0)
    file = write(tmp_path / "pairs.json", pairs(tmp_path))
    with pytest.raises(ConfigError, match="must be left out for pairs"):
        SynCDConfig(path=file, min_dino=0.5).build(seed=0)
