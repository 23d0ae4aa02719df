"""The folder of a project: photos, prompts and a config that trains on them as it is.

Photos are copied, not referred to: upright, in 8-bit RGB on white, of at most 1024 x 1024 pixels,
which is what the data source would make of them anyway. So the folder holds all that a run needs,
no EXIF data (such as where a photo was taken) gets into it, and later changes of the originals
change nothing here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from customized_grpo.config import read_mapping
from customized_grpo.config.shipped import shipped_config
from customized_grpo.data.images import Picture
from customized_grpo.data.photos import SHARE
from customized_grpo.data.splits import scattered
from customized_grpo.errors import ConfigError
from customized_grpo.files import write_folder
from customized_grpo.pictures import png, save_grid
from customized_grpo.rewards.efficientnet_lite import Variant
from customized_grpo.tools.init import guide
from customized_grpo.tools.init.config_text import write_config
from customized_grpo.tools.init.features import knows_photos
from customized_grpo.tools.init.models import EMBEDDED, Preset
from customized_grpo.tools.init.photos import TOO_FEW, Album, CheckedPhoto, printable
from customized_grpo.tools.init.prompts import Prompt, Prompts
from customized_grpo.types import Example, crop_and_resize

_UPDATES = 40  # of the embedded model: 110 s of one core
_TILE = 144  # pixels of a photo on the contact sheet
_MOST_JUDGED = 64  # examples of an evaluation


@dataclass(frozen=True, kw_only=True)
class Project:
    """All that is known before anything is written."""

    folder: Path
    words: str
    """The class, without an article."""
    called: str
    """What prompts call the subject."""
    live: bool
    """Whether it is a person or an animal."""
    seed: int
    preset: Preset
    album: Album
    prompts: Prompts

    @property
    def is_embedded(self) -> bool:
        """Whether the small model is taken, which knows squares and its own grammar only."""
        return self.preset.name == EMBEDDED

    @property
    def run(self) -> Path:
        """Folder of the first run."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", absolute(self.folder).name).lstrip("._-")
        return self.folder / "runs" / (name[:100] or "subject")

    @cached_property
    def aside(self) -> frozenset[Path]:
        """Photos that are kept aside to judge by: a fifth, none where there are few.

        Not one of two that are nearly the same: the other one would be trained on.
        """
        photos = self.album.photos
        single = [
            photo.path
            for photo in photos
            if not any(photo.repeats(other) for other in photos if other is not photo)
        ]
        count = len(photos) // SHARE if len(photos) >= TOO_FEW else 0
        return frozenset(scattered(single, lambda path: path.name)[:count])

    @cached_property
    def copies(self) -> dict[Path, str]:
        """Original -> its copy, relative to the folder."""
        paths = [photo.path for photo in self.album.photos]
        digits = max(2, len(str(len(paths))))
        return {path: _copy_name(path, n, digits) for n, path in enumerate(paths, start=1)}

    @property
    def num_judged(self) -> int:
        """Held-out examples that `cgrpo evaluate` takes."""
        return min(_MOST_JUDGED, len(self.held_out))

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """Rows of train.jsonl: every training prompt with every training photo."""
        return self._rows(self.prompts.training, self._shown)

    @cached_property
    def validation(self) -> list[dict[str, Any]]:
        """Rows of validation.jsonl: every validation prompt with every training photo."""
        first = len(self.prompts.training) + len(self.prompts.held_out) + 1
        rows = self._rows(self.prompts.validation, self._shown, first)
        return scattered(rows, lambda row: row["id"])

    @property
    def _shown(self) -> list[Path]:
        """Photos to train on."""
        return [path for path in self.copies if path not in self.aside]

    @cached_property
    def held_out(self) -> list[dict[str, Any]]:
        """Rows of held_out.jsonl: every held-out prompt with every photo that is kept aside."""
        photos = [path for path in self.copies if path in self.aside] or list(self.copies)
        rows = self._rows(self.prompts.held_out, photos, len(self.prompts.training) + 1)
        return scattered(rows, lambda row: row["id"])

    def _rows(
        self, prompts: Sequence[Prompt], photos: Sequence[Path], first: int = 1
    ) -> list[dict[str, Any]]:
        """``first``: number of the first prompt, so that ids are unique across all files."""
        numbered = enumerate(prompts, start=first)
        return [
            {
                "id": f"{prompt.kind}-{number:03d}-{Path(self.copies[photo]).stem}",
                "prompt": prompt.text,
                "references": [self.copies[photo]],
                "subject": self.words,
            }
            for (number, prompt), photo in product(numbered, photos)
        ]

    def write(self) -> None:
        """Writes the folder, which appears as a whole.

        Raises:
            ConfigError: if the config is not valid.
            DataError: if a photo has changed meanwhile.
        """
        config = write_config(self._config(), guide.header(self, absolute(self.folder)))

        def fill(folder: Path) -> None:
            (folder / "photos").mkdir()
            sheet = []
            for photo in self.album.photos:
                pixels = self._pixels(photo)
                (folder / self.copies[photo.path]).write_bytes(png(pixels))
                sheet.append(self._tile(photo, pixels))
            save_grid(folder / "photos.png", sheet, {}, ("photo", "what was found out about it"))
            parts = {"train": self.training, "validation": self.validation}
            for name, rows in (parts | {"held_out": self.held_out}).items():
                (folder / f"{name}.jsonl").write_text(_lines(rows), encoding="utf-8")
            (folder / "config.yaml").write_text(config, encoding="utf-8")

        write_folder(absolute(self.folder), fill)

    def _tile(self, photo: CheckedPhoto, pixels: Tensor) -> Example:
        """A reduced copy, what becomes of it and the kinds of remarks on it, for the sheet."""
        use = "kept aside to judge by" if photo.path in self.aside else "to train on"
        name, copy = printable(photo.path), Path(self.copies[photo.path]).stem
        kinds = [remark.kind for remark in self.album.remarks if remark.photo == name]
        scale = _TILE / max(pixels.shape[1:])
        height, width = (max(1, round(side * scale)) for side in pixels.shape[1:])
        small = crop_and_resize(pixels, height, width)
        text = f"{copy}: {', '.join([use, *kinds])}"
        return Example(id=copy, prompt=text, references=(small,), subject=self.words)

    def _pixels(self, photo: CheckedPhoto) -> Tensor:
        pixels = Picture(photo.path, "RGB", photo.height, photo.width).load()
        side = min(photo.height, photo.width)
        return crop_and_resize(pixels, side, side) if self.is_embedded else pixels

    def _config(self) -> dict[str, Any]:
        """The config that ships, for these data. Paths are absolute: it works from anywhere."""
        folder = absolute(self.folder)
        raw = _shipped(self.preset)
        evaluation = raw["evaluation"]
        evaluation["num_examples"] = self.num_judged
        evaluation["num_validation"] = min(evaluation["num_validation"], len(self.validation))
        first = {"name": self.run.name, "seed": self.seed, "output_dir": str(folder / "runs")}
        data = {
            "type": "jsonl",
            "path": str(folder / "train.jsonl"),
            "held_out": str(folder / "held_out.jsonl"),
            "validation": str(folder / "validation.jsonl"),
        }
        precision = raw["mixed_precision"]
        return {**first, "mixed_precision": precision, **(raw | first | {"data": data})}


def _shipped(preset: Preset) -> dict[str, Any]:
    """The config that ships, without what one's own photos cannot use."""
    raw = read_mapping(str(shipped_config(preset.config)), "CONFIG")
    if preset.name == EMBEDDED:  # nobody has labelled the user's prompts for the classifier
        del raw["evaluation"]["classifier"]
        raw["train"]["num_updates"] = _UPDATES
        if knows_photos():  # its own judges of identity have seen drawn emoji only
            raw["rewards"] = _by_photo_features(raw["rewards"], "lite0")
            raw["evaluators"] = _by_photo_features(raw["evaluators"], "lite2")
    if preset.name == "uno":  # the paper's HPSv3 wants a checkout of its code and 17 GB
        kontext = read_mapping(str(shipped_config("flux-kontext.yaml")), "CONFIG")
        raw["rewards"] = kontext["rewards"]
        raw["train"]["num_updates"] = 300  # the paper's data are thousands of subjects
    return raw


def _by_photo_features(models: Sequence[dict[str, Any]], variant: Variant) -> list[dict[str, Any]]:
    others = [model for model in models if model["objective"] != "identity"]
    return [*others, {"type": "efficientnet-lite", "objective": "identity", "variant": variant}]


def check_new(folder: Path) -> Path:
    """The folder, if it can become a project.

    Raises:
        ConfigError: if something is in it already.
    """
    if not str(folder).isprintable():
        raise ConfigError(f"FOLDER must have a printable name, got {str(folder)!a}; name another")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"FOLDER must be a new or empty folder, got {str(folder)!r}, which holds "
            "something; name another: nothing is overwritten"
        )
    if Path(os.path.realpath(folder)) == Path.cwd():
        raise ConfigError(
            "FOLDER must not be the folder you are in, which is replaced as a whole; write for "
            "example my-subject"
        )
    return folder


def absolute(folder: Path) -> Path:
    """Without following links."""
    return Path(os.path.abspath(folder))


def _copy_name(path: Path, number: int, digits: int) -> str:
    """Safe in any shell and on any file system, in the order of the originals."""
    words = re.sub(r"[^a-z0-9]+", "-", path.stem.lower())[:40].strip("-")
    return f"photos/{'-'.join(filter(None, (f'{number:0{digits}d}', words)))}.png"


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
