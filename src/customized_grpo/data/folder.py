"""A folder of photos of your subjects, with captions or prompt templates."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from customized_grpo.config import DataConfig
from customized_grpo.config.limits import Count, FilePath
from customized_grpo.data.listed import ListedSource
from customized_grpo.data.photos import (
    SHARE,
    Subject,
    check_folders,
    is_subject,
    photos_in,
    photos_of,
    remarks_on,
    some_subjects,
    split_photos,
)
from customized_grpo.data.sidecars import SUBJECT, CaptionEnding, Sidecars, photos_by_caption
from customized_grpo.data.templates import INANIMATE, LIVE, read_templates
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.files import Names, alike_name, read_text
from customized_grpo.registry import nearest, one_of

_REPEATS = re.compile(r"([1-9]\d{0,2})_(.+)")  # the folders of kohya's sd-scripts


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderConfig(DataConfig):
    """Photos of subjects, one sub-folder per subject, or of one subject in the folder itself.

    A subject is called by the line in its `subject.txt`, such as "a corgi", or else by the name of
    its folder. A folder `10_corgi` is that of "corgi", whose photos count ten times. A caption of a
    photo, in `NAME.txt` or `NAME.caption` beside it, is a prompt for the other photos.
    `NAME.mask.png` or `NAME-masklabel.png` is white where the subject is.
    """

    type: Literal["folder"] = "folder"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: FilePath
    """The folder."""
    templates: tuple[str, ...] | FilePath | None = None
    """Prompts with {subject} in them, besides captions: a list, or a text file with one a line.
    null = built-in ones for subjects of whom fewer than 5 captions can be used."""
    captions: tuple[CaptionEnding, ...] = (".txt", ".caption")
    """Endings of the files of captions; none = captions are not read."""
    triggers: dict[str, str] = field(default_factory=dict)
    """Name of a subject -> the made-up word in its captions that becomes what the subject is
    called, as `[trigger]` does."""
    mask_path: FilePath | None = None
    """A folder with a mask for each photo, of the same name up to its ending; of several subjects
    in sub-folders of the same names."""
    alpha_mask: bool = False
    """Whether the photos' alpha channels are their masks."""
    live: tuple[str, ...] = ()
    """Names of the folders that show a person or an animal: built-in prompts for them differ."""
    held_out: tuple[str, ...] | None = None
    """Names of the folders to evaluate on; null = a fifth of those that are not in `together`, or a
    fifth of the prompts where there are less than two."""
    num_references: Count = 1
    """Photos per example, for generators that take several; of each subject in it."""
    together: tuple[Annotated[tuple[str, ...], Field(min_length=2)], ...] = ()
    """Groups of names of folders: subjects that are also shown in one picture, by the templates."""

    def build(self, seed: int) -> ListedSource:
        """Finds the subjects and checks every photo."""
        subjects = self._subjects()
        names = [subject.name for subject in subjects]
        for given in ("live", "held_out", "triggers"):
            check_names(given, tuple(getattr(self, given) or ()), names)
        grouped = {name for group in self.together for name in group}
        alone = [name for name in names if name not in grouped]
        held_out = some_subjects(alone) if self.held_out is None else self.held_out
        groups = [self._group(given, subjects) for given in self.together]
        shown = [*subjects, *groups]
        splits = split_photos(
            shown,
            held_out,
            self.num_references,
            alpha=self.alpha_mask,
            by_prompt=self.held_out is None and not held_out,
        )
        how = "give at least 5 captions or templates: a fifth of them is for it"
        remarks = remarks_on(subjects, self.num_references, alpha=self.alpha_mask)
        remarks += [f"{group.name} ({group.words!r}): in one picture" for group in groups]
        return ListedSource(splits, seed, how, remarks)

    def _group(self, given: tuple[str, ...], subjects: list[Subject]) -> Subject:
        check_names("together", given, [subject.name for subject in subjects])
        members = [subject for name in given for subject in subjects if subject.name == name]
        words = [member.words for member in members]
        if twice := [text for text in words if words.count(text) > 1]:
            raise ConfigError(
                f"together: must be subjects of different words, got {twice[0]!r} twice in "
                f"{list(given)}; name each once, and tell them apart in their {SUBJECT}"
            )
        is_alive = all(name in self.live for name in given)
        own = None if self.templates is None else read_templates(self.templates)
        return Subject.group(members, own or (LIVE if is_alive else INANIMATE))

    def _subjects(self) -> list[Subject]:
        root = _folder("path", self.path)
        masks = None if self.mask_path is None else _folder("mask_path", self.mask_path)
        folders = [path for path in sorted(root.iterdir()) if is_subject(path, masks)]
        if folders and (loose := photos_in(root)):
            raise DataError(
                f"{root}: must hold photos or sub-folders, got both, such as {loose[0].name} and "
                f"{folders[0].name}; put the photos into a sub-folder"
            )
        check_folders(folders)
        own = None if self.templates is None else read_templates(self.templates)
        sidecars = Sidecars(captions=self.captions, mask_path=masks)
        subjects = [self._subject(path, own, sidecars) for path in folders or [root.resolve()]]
        counts = Counter(subject.name for subject in subjects)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise DataError(
                f"{root}: must hold one folder for each subject, got {counts[twice[0]]} of "
                f"{twice[0]!r}, which differ in repeats only; put their photos into one"
            )
        return subjects

    def _subject(self, folder: Path, own: tuple[str, ...] | None, sidecars: Sidecars) -> Subject:
        photos = photos_of(folder, "at least one photo")
        repeats = _REPEATS.fullmatch(folder.name)
        name = repeats[2] if repeats else folder.name
        words = _words(folder, name)
        subject = Subject(
            name=name,
            words=words,
            photos=photos,
            templates=own or (),
            captions=photos_by_caption(photos, sidecars, words, self.triggers.get(name)),
            sidecars=sidecars,
            repeats=int(repeats[1]) if repeats else 1,
        )
        usable = [c for c in subject.captions if subject.references(c, self.num_references)]
        if own or len(usable) >= SHARE:
            return subject
        return replace(subject, templates=LIVE if name in self.live else INANIMATE)


def _folder(where: str, given: str) -> Path:
    path = Path(given)
    if not path.is_dir():
        raise ConfigError(f"{where}: must be a folder, got {given!r}; correct it")
    return path


def _words(folder: Path, name: str) -> str:
    file = Names().find(folder / SUBJECT)
    if file is None:
        return name.replace("_", " ").replace("-", " ").strip()
    words = read_text(file).strip()
    if not words or "\n" in words:
        raise DataError(f"{file}: must hold one line, what the subject is called, got {words!r}")
    return words


def check_names(field: str, given: tuple[str, ...], names: list[str]) -> None:
    """Raises a ConfigError if a config names a subject that is not there."""
    for name in given:
        if name not in names:
            alike = [n for n in names if alike_name(n) == alike_name(name)]  # may look the same
            fix = nearest(name, names) or one_of(names)
            if alike:
                fix = f"{alike[0]!r} differs in case or accents only; copy it, or rename that"
            raise ConfigError(f"{field}: must name folders of subjects, got {name!r}; {fix}")
