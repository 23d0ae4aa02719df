"""Both forms of SynCD's metadata, as the code that wrote and read them has it (see data/syncd)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import paint
from PIL import Image

from customized_grpo.data.listed import PictureCache, complete
from customized_grpo.data.syncd import SynCDConfig
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.rewards.dinov2 import Dinov2Config


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


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    items = sets(tmp_path)
    del items[0]["filenames"][2]  # of two pictures none has two others
    write(tmp_path / "metadata.json", items)
    (tmp_path / "masks" / "1_0_0.jpg").unlink()  # a reference of two of its set
    assert SynCDConfig(path=str(tmp_path), num_references=2).build(seed=0).remarks == [
        f"{tmp_path}: 9 examples, 9 pictures, 8 masks",
        "2 pictures not used: their sets have fewer than num_references others",
        "2 examples without masks: some of their references have none",
    ]


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
    source = SynCDConfig(path=str(tmp_path), **filters).build(seed=0)
    splits = source.splits
    entries = (*splits.training, *splits.held_out, *splits.validation)
    assert {e.prompt[-1] for e in entries} == places
    left = 4 * (3 - len(places))
    why = "pictures not used: below min_dino or min_aesthetics, or as a twin"
    assert source.remarks[1:] == ([f"{left} {why}"] if left else [])


def test_pairs_of_customized_grpo(tmp_path: Path) -> None:
    file = write(tmp_path / "train.json", pairs(tmp_path / "pictures"))
    config = SynCDConfig(path=file, root=str(tmp_path / "pictures"), held_out=0.3)
    splits = config.build(seed=0).splits
    (entry,) = splits.training
    assert entry.subject == "a red mail box"
    assert entry.prompt.startswith("a red mail box on road")
    assert len(splits.held_out) == len(splits.validation) == 1
    assert (config.build(seed=0).training(0, 1)[0]).references[0].shape == (3, 40, 48)
    assert entry.masks is None


def segmented(form: str) -> Image.Image:
    """The subject of `boxed`, 20 x 16 pixels, without its background."""
    box = (8, 6, 28, 22)
    whole = boxed()
    if form == "mask":
        whole = Image.new("L", whole.size, 0)
        whole.paste(255, box)
    elif form == "transparent":
        alpha = Image.new("L", whole.size, 0)
        alpha.paste(255, box)
        whole.putalpha(alpha)
    else:
        background = Image.new("RGB", whole.size, form)
        background.paste(whole.crop(box), box)
        whole = background
        if form == "blue":  # saved with an alpha channel that says nothing
            whole.putalpha(255)
    return whole


def boxed() -> Image.Image:
    """A picture with something everywhere: dark stripes in it are as dark as a background."""
    pixels = np.random.default_rng(0).integers(40, 200, (40, 48, 3), np.uint8)
    pixels[10:12, 8:28] = 3
    return Image.fromarray(pixels)


@pytest.mark.parametrize("form", ["black", "white", "grey", "blue", "transparent", "mask"])
def test_the_segmented_reference_of_a_pair_is_its_mask(tmp_path: Path, form: str) -> None:
    items = pairs(tmp_path)
    for item in items:
        boxed().save(tmp_path / item["ref_img"])
        segmented(form).save(tmp_path / item["ref_img"].replace(".png", "_seg.png"))
    source = SynCDConfig(path=write(tmp_path / "train.json", items), held_out=0.3).build(seed=0)
    (example,) = source.training(0, 1)
    assert example.reference_masks is not None
    expected = torch.zeros(1, 40, 48)
    expected[:, 6:22, 8:28] = 1
    assert (example.reference_masks[0] != expected).float().mean() < 0.01


def test_identity_is_held_against_the_segmented_reference(tmp_path: Path) -> None:
    """The released trainer's reward: of a pair's reference it sees NAME_seg.png."""
    items = pairs(tmp_path)
    boxed().save(tmp_path / items[0]["ref_img"])
    segmented("white").save(tmp_path / items[0]["ref_img"].replace(".png", "_seg.png"))
    source = SynCDConfig(path=write(tmp_path / "train.json", items), held_out=0.3).build(seed=0)
    splits = source.splits
    (entry,) = (e for e in (*splits.training, *splits.held_out, *splits.validation) if e.masks)
    example = complete(entry, PictureCache())
    reward = Dinov2Config(
        objective="identity", path="embedded:reward-dino", region="subject"
    ).build(torch.device("cpu"))
    subject = torch.full((3, 20, 20), 0.5)
    subject[:, 2:18] = example.references[0][:, 6:22, 8:28]
    scores = reward.score(torch.stack([subject, torch.rand(3, 20, 20)]), [example] * 2)
    assert scores[0] == pytest.approx(1, abs=1e-4)
    assert scores[1] < 0.9


def test_a_segmented_reference_of_another_size_is_refused(tmp_path: Path) -> None:
    items = pairs(tmp_path)
    paint(tmp_path / items[0]["ref_img"].replace(".png", "_seg.png"), size=(40, 40))
    with pytest.raises(DataError, match=r"item 0: masks: must match the references in .* size"):
        SynCDConfig(path=write(tmp_path / "train.json", items)).build(seed=0)


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
