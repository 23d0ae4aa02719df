"""Photos of subjects times prompt templates: what ``folder`` and ``dreambench`` have in common."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from customized_grpo.config.decoding import is_clean
from customized_grpo.data.listed import Splits
from customized_grpo.data.rows import Row, read_rows
from customized_grpo.data.splits import scattered, sort_into_splits
from customized_grpo.data.templates import fill
from customized_grpo.errors import DataError
from customized_grpo.inputs import Names, alike_name

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
MASK = ".mask.png"
SUBJECT = "subject.txt"
_MASK_ENDING = re.compile(r"(.+)[-_. ](mask|masklabel|matte|seg|segmentation)s?")
_WHY_NOT = {
    "HEIC, which is not read here; save it as JPEG": ".heic .heif .hif",
    "a camera's raw file; export it as JPEG": ".dng .cr2 .cr3 .nef .arw .orf .rw2 .raf",
    "a film; save single pictures of it as JPEG": ".mp4 .mov .avi .mkv .webm .m4v",
    "a text, and captions are not used: templates give the prompts": ".txt .caption .json",
}
SHARE = 5  # one in so many templates, subjects or prompts is held out


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One subject: its photos and what may be asked of it."""

    name: str
    """The name of its folder, which is unique."""
    words: str
    """What it is called in prompts."""
    photos: tuple[Path, ...]
    templates: tuple[str, ...]


def photos_in(folder: Path) -> tuple[Path, ...]:
    """The photos of a folder, by name; masks are not among them.

    Raises:
        DataError: if one looks like a mask as another program names it.
    """
    photos = tuple(
        sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in SUFFIXES
            and not is_mask(path)
            and not path.name.startswith(".")
            and not path.is_dir()  # a broken link is named when it is opened
        )
    )
    stems = {alike_name(photo.stem): photo for photo in photos}
    for photo in photos:
        found = _MASK_ENDING.fullmatch(alike_name(photo.stem))
        if found and (whole := stems.get(found[1])):
            raise DataError(
                f"{photo}: looks like a mask of {whole.name} and would be trained on as a photo; "
                f"rename it {whole.stem}{MASK} (white where the subject is, in PNG), or, if it is "
                "a photo, otherwise"
            )
    return photos


def is_mask(path: Path) -> bool:
    """Whether a file is called NAME.mask.png, in any case."""
    return path.name.lower().endswith(MASK)


def photos_of(folder: Path, what: str) -> tuple[Path, ...]:
    """The photos of a subject's folder, which must hold ``what``.

    Raises:
        DataError: if there are none, naming what else is there; see ``photos_in``.
    """
    if photos := photos_in(folder) if folder.is_dir() else ():
        return photos
    others = [f"{path.name} ({why})" for path, why in left_out(folder, ())]
    found = f"none, but {', '.join(others[:3])}" if others else "none"
    raise DataError(f"{folder}: must hold {what}, got {found}; add some or remove the folder")


def left_out(folder: Path, used: Collection[Path]) -> Iterator[tuple[Path, str]]:
    """Whatever else lies in a subject's folder, hidden files left aside, and why it is no photo."""
    reasons = {suffix: why for why, some in _WHY_NOT.items() for suffix in some.split()}
    unreadable = "no picture in a format that can be read; save it as JPEG or PNG"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path in used or path.name.startswith(".") or alike_name(path.name) == SUBJECT:
            continue
        if path.is_dir():
            yield path, "not looked into: the photos of a subject lie in one folder"
        elif is_mask(path):
            yield path, "a mask without a photo of its name"
        else:
            yield path, reasons.get(path.suffix.lower(), unreadable)


def remarks_on(subjects: Sequence[Subject]) -> list[str]:
    """A line for each subject: how many photos of it are used, and what of its folder is not."""
    lines, names = [], Names()
    for subject in subjects:
        masks = [mask for photo in subject.photos if (mask := mask_of(photo, names))]
        folder = subject.photos[0].parent
        others: dict[str, list[str]] = {}
        for path, why in left_out(folder, {*subject.photos, *masks}):
            others.setdefault(why, []).append(path.name)
        used = f"{subject.name} ({subject.words!r}): {len(subject.photos)} photos"
        used += f", {len(masks)} masks" if masks else ""
        unused = [f"{len(n)} not used, such as {n[0]}: {why}" for why, n in others.items()]
        lines.append("; ".join([used, *unused]))
    return lines


def check_folders(folders: Sequence[Path]) -> None:
    """Raises a DataError if one of the subjects' folders looks like the masks of another."""
    names = {alike_name(folder.name) for folder in folders}
    for folder in folders:
        name = alike_name(folder.name)
        found = _MASK_ENDING.fullmatch(name)
        if name in ("mask", "masks") or (found and found[1] in names):
            raise DataError(
                f"{folder}: looks like masks and would be trained on as a subject; put each beside "
                f"its photo as NAME{MASK}, or rename the folder"
            )


def split_photos(
    subjects: Sequence[Subject], held_out: Collection[str], num_references: int
) -> Splits:
    """Every photo (with the next ones, if there are several references) with every template.

    Held out are some subjects, or of a single one a fifth of its templates. Another fifth of the
    templates is for validation, on the subjects that are trained.
    """
    masks = _masks([photo for subject in subjects for photo in subject.photos])
    rows: list[Row] = []
    parts: list[str] = []
    for subject in subjects:
        for template, part in _parts(subject, single=len(subjects) == 1).items():
            for references in _references(subject, num_references):
                row = Row(
                    where=str(references[0].parent),
                    id=f"{subject.name}/{references[0].name}/{template}",
                    prompt=fill(template, subject.words),
                    subject=subject.words,
                    references=references,
                    masks=tuple(masks[photo] for photo in references) if masks else (),
                )
                rows.append(row)
                parts.append("held_out" if subject.name in held_out else part)
    splits = sort_into_splits(read_rows(rows, "photos"), parts)
    if not splits.training or not splits.held_out:
        raise DataError(
            "held_out: must leave something to train on and something to hold out, got "
            f"{len(splits.training)} and {len(splits.held_out)} examples; name other subjects "
            "or add photos or templates"
        )
    return splits


def some_subjects(names: Collection[str]) -> frozenset[str]:
    """A fifth of the subjects, at least one; of a single subject none is held out."""
    return frozenset(scattered(names, str)[: max(1, len(names) // SHARE)] if len(names) > 1 else ())


def _parts(subject: Subject, single: bool) -> dict[str, str]:
    """Template -> split."""
    order = scattered(subject.templates, str)
    fifth = len(order) // SHARE
    part = dict.fromkeys(subject.templates, "training")
    part |= dict.fromkeys(order[:fifth], "validation")
    if single:
        part |= dict.fromkeys(order[fifth : fifth + max(1, fifth)], "held_out")
    return part


def _masks(photos: Sequence[Path]) -> dict[Path, Path]:
    """The masks that lie beside the photos: all have one, or none has.

    Raises:
        DataError: if some have one, or a name is not UTF-8.
    """
    if odd := [photo for photo in photos if not is_clean(str(photo))]:
        raise DataError(f"{str(odd[0])!a}: must have a name in UTF-8; rename it")
    names = Names()
    masks = {photo: mask for photo in photos if (mask := mask_of(photo, names))}
    bare = [photo for photo in photos if photo not in masks]
    if masks and bare:
        raise DataError(
            f"{bare[0]}: must have a mask {bare[0].stem}{MASK}, as {len(masks)} "
            "other photos have one; draw it, or remove the masks"
        )
    return masks


def mask_of(photo: Path, names: Names) -> Path | None:
    """The mask beside a photo, NAME.mask.png for NAME.jpg; None: there is none."""
    return names.find(photo.with_name(photo.stem + MASK))


def _references(subject: Subject, count: int) -> list[tuple[Path, ...]]:
    """Every photo with the next ones, the first following the last."""
    photos = subject.photos
    if len(photos) < count:
        raise DataError(
            f"{subject.name}: must have at least num_references = {count} photos, got "
            f"{len(photos)}; add some, or lower num_references"
        )
    return [(photos[i:] + photos[:i])[:count] for i in range(len(photos))]
