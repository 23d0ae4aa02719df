"""What lies beside a photo and belongs to it: its mask and its captions, found by name.

Names as other programs write them: ``NAME.txt`` and ``NAME.caption`` (kohya's sd-scripts,
ai-toolkit, SimpleTuner, OneTrainer), ``NAME-masklabel.png`` (OneTrainer), a folder with masks of
the photos' names (ai-toolkit's ``mask_path``); ``NAME.mask.png`` is our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from customized_grpo.data.images import suffixes
from customized_grpo.errors import DataError
from customized_grpo.files import Names, alike_name, read_text

SUBJECT = "subject.txt"
MASK = ".mask.png"
_MASKS = (MASK, "-masklabel.png")
_BESIDE = (*_MASKS, "-condlabel.png")  # the last is OneTrainer's picture to be conditioned on
_PLACEHOLDERS = (r"\[trigger\]", r"\[name\]")  # of ai-toolkit

CaptionEnding = Literal[".txt", ".caption"]


def is_sidecar(path: Path) -> bool:
    """Whether a file is called as a mask or another picture that belongs to a photo."""
    return path.name.lower().endswith(_BESIDE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecars:
    """Where the masks and the captions of photos are looked for."""

    names: Names = field(default_factory=Names)
    captions: tuple[CaptionEnding, ...] = ()
    mask_path: Path | None = None
    """A folder of masks, or of folders of masks that are called as those of the photos."""

    def mask_of(self, photo: Path) -> Path | None:
        """The mask of a photo; None: there is none.

        Raises:
            DataError: if there are several.
        """
        places = [photo.with_name(photo.stem + ending) for ending in _MASKS]
        if self.mask_path is not None:
            folder = self.names.find(self.mask_path / photo.parent.name) or self.mask_path
            places += [folder / (photo.stem + suffix) for suffix in suffixes()]
        found = list(dict.fromkeys(mask for place in places if (mask := self.names.find(place))))
        if len(found) > 1:
            raise DataError(
                f"{photo}: must have one mask, got {' and '.join(map(str, found))}; remove one"
            )
        return found[0] if found else None

    def expected_mask(self, photo: Path) -> Path | str:
        """What a mask of a photo would be called."""
        if self.mask_path is None:
            return photo.stem + MASK
        return self.mask_path / f"{photo.stem}.png"

    def captions_of(self, photo: Path) -> list[Path]:
        """The files with captions of a photo."""
        places = (photo.with_suffix(ending) for ending in self.captions)
        found = (self.names.find(place) for place in places)
        return [file for file in found if file and alike_name(file.name) != SUBJECT]


def read_captions(file: Path, words: str, trigger: str | None) -> list[str]:
    """The captions in a file, one a line.

    Args:
        file: of a photo.
        words: for the subject, in place of ``[trigger]`` and the trigger itself.
        trigger: a made-up word that captions call the subject by.

    Raises:
        DataError: if there are none.
    """
    lines = [line.strip() for line in read_text(file).split("\n") if line.strip()]
    if not lines:
        raise DataError(f"{file}: must hold a caption, got none; write one or remove the file")
    names = [*_PLACEHOLDERS, *([rf"(?<!\w){re.escape(trigger)}(?!\w)"] if trigger else [])]
    return [re.sub("|".join(names), lambda _: words, line, flags=re.IGNORECASE) for line in lines]


def photos_by_caption(
    photos: Sequence[Path], sidecars: Sidecars, words: str, trigger: str | None
) -> dict[str, frozenset[Path]]:
    """Every caption of some photos, and those of them that it is a caption of.

    Raises:
        DataError: if a file of captions cannot be read or holds none.
    """
    found: dict[str, set[Path]] = {}
    for photo in photos:
        for file in sidecars.captions_of(photo):
            for caption in read_captions(file, words, trigger):
                found.setdefault(caption, set()).add(photo)
    return {caption: frozenset(own) for caption, own in found.items()}
