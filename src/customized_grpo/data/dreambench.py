"""DreamBench: the photos and prompts of DreamBooth (arXiv:2208.12242), from its own folder.

The dataset is github.com/google/dreambooth, CC BY 4.0; nothing of it is part of this package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from customized_grpo.config import DataConfig
from customized_grpo.config.limits import Count, FilePath
from customized_grpo.data.folder import check_names
from customized_grpo.data.listed import ListedSource
from customized_grpo.data.photos import Subject, photos_of, remarks_on, split_photos
from customized_grpo.data.templates import PLACEHOLDER
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.files import Names, read_text

PROMPTS = "prompts_and_classes.txt"
LIVE_CLASSES = frozenset({"cat", "dog"})  # the file has prompts for live subjects, no list of them

# Two animals, a toy and three things; of a teapot no other is left to train on.
HELD_OUT = ("backpack_dog", "cat2", "dog8", "grey_sloth_plushie", "shiny_sneaker", "teapot")

# The photo of each subject in UNO's datasets/dreambench_singleip.json, as
# github.com/Safeoffellow/Customized-GRPO has it.
_OF_PHOTO = {
    0: "dog5 poop_emoji red_cartoon robot_toy",
    1: "can dog7 duck_toy shiny_sneaker",
    2: "backpack backpack_dog berry_bowl candle cat2 colorful_sneaker dog dog2 dog6 fancy_boot "
    "vase",
    3: "bear_plushie clock rc_car",
    4: "cat dog8 grey_sloth_plushie monster_toy pink_sunglasses teapot wolf_plushie",
    5: "dog3",
}
UNO_REFERENCES = {
    name: f"{number:02d}.jpg" for number, names in _OF_PHOTO.items() for name in names.split()
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DreamBenchConfig(DataConfig):
    """The folder `dataset` of DreamBench: 30 subjects, 25 prompts for each."""

    type: Literal["dreambench"] = "dreambench"  # pyright: ignore
    path: FilePath
    """The folder that holds `prompts_and_classes.txt` and a folder per subject."""
    held_out: tuple[str, ...] = HELD_OUT
    """Names of the subjects to evaluate on; the others are trained on."""
    num_references: Count = 1
    """Photos per example, for generators that take several."""

    def build(self, seed: int) -> ListedSource:
        """Reads the prompts and checks every photo."""
        subjects = read_subjects(self.path)
        check_names("held_out", self.held_out, [subject.name for subject in subjects])
        splits = split_photos(subjects, self.held_out, self.num_references)
        how = f"restore {PROMPTS}: a fifth of the prompts is for it"
        remarks = [*remarks_on(subjects, self.num_references), *_unnamed(Path(self.path), subjects)]
        return ListedSource(splits, seed, how, remarks)


def _unnamed(root: Path, subjects: Sequence[Subject]) -> Iterator[str]:
    known = {subject.photos[0].parent.name for subject in subjects}
    for path in sorted(root.iterdir()):
        if path.is_dir() and path.name not in known and not path.name.startswith("."):
            yield f"{path.name} not used: {PROMPTS} does not name it"


def read_subjects(path: str) -> list[Subject]:
    """All subjects of the dataset with the prompts for their class.

    Raises:
        ConfigError: if it is not the folder.
        DataError: if the prompts file is not of the published form, or a subject has no photos.
    """
    root, names = Path(path), Names()
    file = names.find(root / PROMPTS)
    if file is None:
        raise ConfigError(
            f"path: must be a folder with {PROMPTS}, got {path!r}; it is the folder 'dataset' of "
            "github.com/google/dreambooth"
        )
    text = read_text(file)
    head, _, tail = text.partition("Object Prompts")
    objects, _, live = tail.partition("Live Subject Prompts")
    classes = re.findall(r"^([^,\n]+),([^,\n]+?)[^\S\n]*$", head, re.M)
    classes = [(name, kind) for name, kind in classes if name != "subject_name"]
    templates = {True: _templates(live), False: _templates(objects)}
    if not classes or not all(templates.values()):
        raise DataError(
            f"{file}: must have lines 'subject,class' and two lists of prompts, got {len(classes)} "
            f"and {[len(t) for t in templates.values()]}; restore it from the dataset"
        )
    folders = [(names.find(root / name.strip()) or root / name, kind) for name, kind in classes]
    return [_subject(folder, kind, templates[is_live(kind)]) for folder, kind in folders]


def is_live(kind: str) -> bool:
    """Whether a class is one that the prompts for live subjects are for."""
    return kind.lower() in LIVE_CLASSES


def _templates(part: str) -> tuple[str, ...]:
    """Lines such as 'a {0} {1} in the snow'.format(unique_token, class_token); no token here."""
    prompts = re.findall(r"""^\s*(['"])(.*)\1\.format\(unique_token, class_token\)""", part, re.M)
    return tuple(prompt.replace("{0} {1}", PLACEHOLDER) for _, prompt in prompts)


def _subject(folder: Path, kind: str, templates: tuple[str, ...]) -> Subject:
    photos = photos_of(folder, f"the photos of a subject in {PROMPTS}")
    return Subject(name=folder.name, words=kind, photos=photos, templates=templates)
