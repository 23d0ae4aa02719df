"""Folders as other programs write them: what is used of them, what is not, and that a run trains.

Each writer makes what its program's code reads: sd-scripts (`library/config_util.py`,
`train_util.py`), ai-toolkit (`toolkit/dataloader_mixins`), SimpleTuner (`prompts.py`), OneTrainer.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, changed
from pictures import paint
from PIL import Image

from customized_grpo.cli.main import main
from customized_grpo.config import RunConfig, load_config
from customized_grpo.data.folder import FolderConfig
from customized_grpo.data.listed import Entry, ListedSource
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.training.train import train

PLACES = ("on a beach", "in the snow", "in a kitchen", "on a sofa", "by a lake", "in a shop")
TWO = ("{subject} on Mars", "{subject} in a cave")


def kohya(folder: Path) -> dict[str, Any]:
    """sd-scripts: repeats and class in the folder's name, `.caption`, caches of latents."""
    for name, photos in (("10_ohwx dog", 6), ("5_red mug", 6), ("2_hat", 2)):
        for n in range(photos):
            photo = paint(folder / name / f"{n}.png")
            if name != "2_hat":
                photo.with_suffix(".caption").write_text(f"{name[-3:]} {PLACES[n]}\n")
    (folder / "10_ohwx dog" / "0_0048x0040_flux.npz").write_bytes(b"any")
    return {"held_out": ("hat",)}


def ai_toolkit(folder: Path) -> dict[str, Any]:
    """`[trigger]` in `.txt`, masks of the photos' names in a folder, caches."""
    for n in range(6):
        photo = paint(folder / "rex" / f"{n}.jpg")
        photo.with_suffix(".txt").write_text(f"[trigger] {PLACES[n]}, ohwx is happy")
        paint(folder / "masks" / f"{n}.png", color=255)
    (folder / "rex" / "subject.txt").write_text("a corgi")
    (folder / "rex" / "_latent_cache").mkdir()
    (folder / "rex" / "_latent_cache" / "0.safetensors").write_bytes(b"any")
    return {
        "path": str(folder / "rex"),
        "mask_path": str(folder / "masks"),
        "triggers": {"rex": "ohwx"},
    }


def ai_toolkit_alpha(folder: Path) -> dict[str, Any]:
    """`alpha_mask`: the mask is in the photo."""
    for n in range(6):
        photo = folder / "rex" / f"{n}.png"
        photo.parent.mkdir(parents=True, exist_ok=True)
        cut = Image.new("RGBA", (48, 40), (255, 0, 0, 0))
        cut.paste((255, 0, 0, 255), (0, 0, 24, 40))
        cut.save(photo)
        photo.with_suffix(".txt").write_text(f"rex {PLACES[n]}")
    return {"path": str(folder / "rex"), "alpha_mask": True}


def simple_tuner(folder: Path) -> dict[str, Any]:
    """`caption_strategy: textfile`, several captions a photo, its lists of files."""
    for n in range(3):
        photo = paint(folder / "rex" / f"{n}.webp")
        photo.with_suffix(".txt").write_text(f"rex {PLACES[n]}\n\nrex {PLACES[n + 3]}\n")
    (folder / "rex" / "aspect_ratio_bucket_indices_rex.json").write_text("{}")
    return {"path": str(folder / "rex")}


def one_trainer(folder: Path) -> dict[str, Any]:
    """`.txt`, `-masklabel.png`, `-condlabel.png`."""
    for n in range(6):
        photo = paint(folder / "rex" / f"{n}.jpg")
        photo.with_suffix(".txt").write_text(f"rex {PLACES[n]}")
        paint(folder / "rex" / f"{n}-masklabel.png", color=255)
        paint(folder / "rex" / f"{n}-condlabel.png")
    return {"path": str(folder / "rex")}


WRITERS: dict[Callable[[Path], dict[str, Any]], list[str]] = {
    kohya: [
        "ohwx dog ('ohwx dog'): 6 photos, 6 captions, each counts 10 times; 1 not used, such as "
        "0_0048x0040_flux.npz: a cache of another trainer",
        "hat ('hat'): 2 photos, each counts 2 times",
        "red mug ('red mug'): 6 photos, 6 captions, each counts 5 times",
    ],
    ai_toolkit: [
        "rex ('a corgi'): 6 photos, 6 captions, 6 masks; 1 not used, such as _latent_cache: not "
        "looked into: the photos of a subject lie in one folder"
    ],
    ai_toolkit_alpha: ["rex ('rex'): 6 photos, 6 captions, 6 masks in their alpha channels"],
    simple_tuner: [
        "rex ('rex'): 3 photos, 6 captions; 1 not used, such as "
        "aspect_ratio_bucket_indices_rex.json: JSON, whose captions are not read; write each into "
        "NAME.txt"
    ],
    one_trainer: [
        "rex ('rex'): 6 photos, 6 captions, 6 masks; 6 not used, such as 0-condlabel.png: a mask "
        "without a photo of its name, or a picture to be conditioned on"
    ],
}

every_program = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)


def section(folder: Path, write: Callable[[Path], dict[str, Any]]) -> FolderConfig:
    return FolderConfig(**({"path": str(folder)} | write(folder)))


def entries(source: ListedSource) -> list[Entry]:
    splits = source.splits
    return [*splits.training, *splits.held_out, *splits.validation]


def photo_names(entry: Entry) -> list[str]:
    return [picture.path.name for picture in entry.references]  # pyright: ignore


@every_program
def test_what_is_used_and_what_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Callable[[Path], dict[str, Any]]
) -> None:
    raw = yaml.safe_load((ROOT / "configs" / "emoji.yaml").read_text("utf-8"))
    data = {"path": str(tmp_path / "photos")} | write(tmp_path / "photos")
    data = {name: list(v) if isinstance(v, tuple) else v for name, v in data.items()}
    raw["data"] = {"type": "customized_grpo.data.folder:FolderConfig"} | data
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    command = ["data", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "sheet.png")]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if " photos" in line] == WRITERS[write]
    if write is kohya:  # 4 of 6 captions, each with 5 photos: twice for the dog, once for the mug
        assert lines[0] == "training: 75 examples with repeats, 50 different"


@every_program
def test_no_caption_is_shown_with_the_photo_that_it_describes(
    tmp_path: Path, write: Callable[[Path], dict[str, Any]]
) -> None:
    found = {entry.id: entry for entry in entries(section(tmp_path, write).build(0))}.values()
    shown = Counter()
    for entry in found:
        own = [n for n, place in enumerate(PLACES) if place in entry.prompt]
        if entry.subject != "hat":
            assert own[0] % 6 != int(photo_names(entry)[0][0])
            if write is simple_tuner:
                assert own[0] % 3 != int(photo_names(entry)[0][0])
            shown[entry.prompt] += 1
    assert len(shown) == (12 if write is kohya else 6)
    assert set(shown.values()) == {2 if write is simple_tuner else 5}  # with all other photos


def test_repeats_are_the_odds_of_a_subject(tmp_path: Path) -> None:
    splits = section(tmp_path, kohya).build(0).splits
    seen = Counter(entry.id for entry in splits.training)
    assert {i.split("/")[0]: n for i, n in seen.items()} == {"ohwx dog": 2, "red mug": 1}
    assert {len(Counter(e.id for e in part)) / len(part) for part in (splits.held_out,)} == {1}
    (tmp_path / "10_ohwx dog").rename(tmp_path / "010_ohwx dog")  # a number of another kind
    splits = FolderConfig(path=str(tmp_path), held_out=("hat",)).build(0).splits
    assert {e.subject for e in splits.training} == {"010 ohwx dog", "red mug"}


def test_two_folders_that_differ_in_repeats_are_one_subject(tmp_path: Path) -> None:
    for name in ("10_rex", "5_rex", "mug"):
        paint(tmp_path / name / "0.png")
    with pytest.raises(DataError, match="one folder for each subject, got 2 of 'rex'"):
        FolderConfig(path=str(tmp_path)).build(0)


def test_the_trigger_becomes_what_the_subject_is_called(tmp_path: Path) -> None:
    config = section(tmp_path, ai_toolkit)
    prompts = {entry.prompt for entry in entries(config.build(0))}
    assert prompts == {f"a corgi {place}, a corgi is happy" for place in PLACES}
    (tmp_path / "rex" / "0.txt").write_text(r"[TRIGGER] \1, an ohwxy thing, OHWX!")
    prompts = {entry.prompt for entry in entries(config.build(0))}
    assert r"a corgi \1, an ohwxy thing, a corgi!" in prompts
    other = dataclasses.replace(config, triggers={"rexx": "ohwx"})
    with pytest.raises(ConfigError, match=r"triggers: must name folders.*did you mean 'rex'"):
        other.build(0)


def test_masks_by_name(tmp_path: Path) -> None:
    for write in (ai_toolkit, ai_toolkit_alpha, one_trainer):
        source = section(tmp_path / write.__name__, write).build(0)
        (example,) = source.training(0, 1)
        assert example.reference_masks is not None
        right = 0 if write is ai_toolkit_alpha else 1
        assert example.reference_masks[0][0, :, :24].unique().tolist() == [1]
        assert example.reference_masks[0][0, :, 24:].unique().tolist() == [right]


def test_a_mask_of_several_subjects_is_looked_for_by_subject(tmp_path: Path) -> None:
    for name in ("rex", "mug"):
        paint(tmp_path / "photos" / name / "0.jpg")
        paint(tmp_path / "photos" / "masks" / name / "0.png", color=255)
    config = FolderConfig(
        path=str(tmp_path / "photos"), mask_path=str(tmp_path / "photos" / "masks")
    )
    assert all(entry.masks for entry in entries(config.build(0)))
    for name in ("rex", "mug"):
        shutil.rmtree(tmp_path / "photos" / "masks" / name)
    paint(tmp_path / "photos" / "masks" / "0.png", color=255)
    with pytest.raises(DataError, match=r"0\.png: must be the mask of one photo, got 0\.jpg of"):
        config.build(0)


def test_masks_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    config = section(tmp_path, one_trainer)
    paint(tmp_path / "rex" / "0.mask.png", color=255)
    with pytest.raises(DataError, match=r"0\.jpg: must have one mask, got .*0\.mask\.png and"):
        config.build(0)
    (tmp_path / "rex" / "0.mask.png").unlink()
    both = dataclasses.replace(config, alpha_mask=True)
    with pytest.raises(DataError, match=r"must have one mask, got a file and, by alpha_mask"):
        both.build(0)
    for n in range(6):
        (tmp_path / "rex" / f"{n}-masklabel.png").unlink()
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"0\.jpg: must have a mask .*none/0\.png, as 0 other"):
        dataclasses.replace(config, mask_path=str(tmp_path / "none")).build(0)
    with pytest.raises(DataError, match=r"0\.jpg: must have an alpha channel for alpha_mask"):
        both.build(0)
    Image.new("RGBA", (48, 40), "red").save(tmp_path / "rex" / "0.jpg", format="PNG")
    with pytest.raises(DataError, match=r"0\.jpg: must .*, got mode RGBA, opaque everywhere; save"):
        both.build(0)
    with pytest.raises(ConfigError, match="mask_path: must be a folder, got 'nowhere'"):
        dataclasses.replace(config, mask_path="nowhere").build(0)


@pytest.mark.parametrize(
    ("captions", "num_references", "says"),
    [
        (["rex here", "rex here"], 1, "2 photos, 25 templates; 1 captions not used, such as 'rex"),
        (["rex here", "rex there"], 1, "2 photos, 2 captions, 25 templates"),
        (["rex here", "rex there"], 2, "2 photos, 25 templates; 2 captions not used, such as"),
    ],
)
def test_captions_that_cannot_be_used_are_said(
    tmp_path: Path, captions: list[str], num_references: int, says: str
) -> None:
    for n, caption in enumerate(captions):
        paint(tmp_path / "rex" / f"{n}.png").with_suffix(".txt").write_text(caption)
    config = FolderConfig(path=str(tmp_path / "rex"), num_references=num_references)
    assert says in config.build(0).remarks[0]


def test_the_words_for_the_subject_are_no_caption(tmp_path: Path) -> None:
    for name in ("subject.jpg", "other.jpg"):
        paint(tmp_path / "rex" / name)
    (tmp_path / "rex" / "subject.txt").write_text("a corgi")
    source = FolderConfig(path=str(tmp_path / "rex"), templates=TWO).build(0)
    assert {e.prompt for e in entries(source)} == {"a corgi on Mars", "a corgi in a cave"}


def test_templates_come_besides_captions_and_captions_can_be_left(tmp_path: Path) -> None:
    config = dataclasses.replace(section(tmp_path, simple_tuner), templates=TWO)
    assert len({e.prompt for e in entries(config.build(0))}) == 6 + 2
    source = dataclasses.replace(config, captions=()).build(0)
    assert {e.prompt for e in entries(source)} == {"rex on Mars", "rex in a cave"}
    assert "3 not used, such as 0.txt: a text that is no caption in use" in source.remarks[0]


def trained(config: RunConfig, data: FolderConfig) -> Path:
    tiny = changed(config, train={"num_updates": 1}, rollout={"group_size": 2})
    return train(dataclasses.replace(tiny, data=data))


@pytest.mark.slow
def test_a_run_trains_on_them(tmp_path: Path, tiny_config: RunConfig) -> None:
    """One run on subjects of several programs: kohya's folders, OneTrainer's masks, triggers."""
    for name in ("3_rex", "1_mug", "hat"):
        for n in range(6):
            photo = paint(tmp_path / "photos" / name / f"{n}.jpg")
            photo.with_suffix(".txt").write_text(f"[trigger] {PLACES[n]}")
            paint(photo.with_name(f"{n}-masklabel.png"), color=255)
    data = FolderConfig(path=str(tmp_path / "photos"), held_out=("hat",), triggers={"rex": "ohwx"})
    run = trained(tiny_config, data)
    assert load_config(run / "config.yaml").data == data
    (row,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert math.isfinite(row["reward/dinov2/mean"])
