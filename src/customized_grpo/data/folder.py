"""A folder of photos of your subjects, and prompt templates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from customized_grpo.config import DataConfig
from customized_grpo.config.limits import Count
from customized_grpo.data.listed import ListedSource
from customized_grpo.data.photos import (
    SUBJECT,
    Subject,
    check_folders,
    photos_in,
    photos_of,
    remarks_on,
    some_subjects,
    split_photos,
)
from customized_grpo.data.templates import INANIMATE, LIVE, read_templates
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.inputs import Names, read_text
from customized_grpo.registry import nearest, one_of


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderConfig(DataConfig):
    """Photos of subjects, one sub-folder per subject, or of one subject in the folder itself.

    A subject is called by the line in its `subject.txt`, such as "a corgi", or else by the name of
    its folder. `NAME.mask.png` beside `NAME.jpg` is white where the subject is.
    """

    type: Literal["folder"] = "folder"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: str
    """The folder."""
    templates: tuple[str, ...] | str | None = None
    """Prompts with {subject} in them: a list, or a text file with one a line; null = built-in."""
    live: tuple[str, ...] = ()
    """Names of the folders that show a person or an animal: built-in prompts for them differ."""
    held_out: tuple[str, ...] | None = None
    """Names of the folders to evaluate on; null = a fifth of them, or a fifth of the prompts where
    there is one subject."""
    num_references: Count = 1
    """Photos per example, for generators that take several."""

    def build(self, seed: int) -> ListedSource:
        """Finds the subjects and checks every photo."""
        subjects = self._subjects()
        names = [subject.name for subject in subjects]
        for field in ("live", "held_out"):
            check_names(field, getattr(self, field) or (), names)
        held_out = some_subjects(names) if self.held_out is None else self.held_out
        splits = split_photos(subjects, held_out, self.num_references)
        how = "give at least 5 templates: a fifth of them is for it"
        return ListedSource(splits, seed, how, remarks_on(subjects))

    def _subjects(self) -> list[Subject]:
        root = Path(self.path)
        if not root.is_dir():
            raise ConfigError(f"path: must be a folder, got {self.path!r}; correct it")
        folders = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
        if folders and (loose := photos_in(root)):
            raise DataError(
                f"{root}: must hold photos or sub-folders, got both, such as {loose[0].name} and "
                f"{folders[0].name}; put the photos into a sub-folder"
            )
        check_folders(folders)
        own = None if self.templates is None else read_templates(self.templates)
        return [self._subject(folder, own) for folder in folders or [root.resolve()]]

    def _subject(self, folder: Path, own: tuple[str, ...] | None) -> Subject:
        photos = photos_of(folder, "at least one photo")
        built_in = LIVE if folder.name in self.live else INANIMATE
        return Subject(
            name=folder.name, words=_words(folder), photos=photos, templates=own or built_in
        )


def _words(folder: Path) -> str:
    file = Names().find(folder / SUBJECT)
    if file is None:
        return folder.name.replace("_", " ").replace("-", " ").strip()
    words = read_text(file).strip()
    if not words or "\n" in words:
        raise DataError(f"{file}: must hold one line, what the subject is called, got {words!r}")
    return words


def check_names(field: str, given: tuple[str, ...], names: list[str]) -> None:
    """Raises a ConfigError if a config names a subject that is not there."""
    for name in given:
        if name not in names:
            fix = nearest(name, names) or one_of(names)
            raise ConfigError(f"{field}: must name folders of subjects, got {name!r}; {fix}")
