"""Photos of subjects times prompt templates: what ``folder`` and ``dreambench`` have in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from customized_grpo.config.decoding import is_clean
from customized_grpo.data.listed import Splits
from customized_grpo.data.rows import Row, read_rows
from customized_grpo.data.splits import scattered, sort_into_splits
from customized_grpo.data.templates import fill
from customized_grpo.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
MASK = ".mask.png"
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
    """The photos of a folder, by name; masks are not among them."""
    return tuple(
        sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in SUFFIXES
            and not path.name.endswith(MASK)
            and not path.name.startswith(".")
            and not path.is_dir()  # a broken link is named when it is opened
        )
    )


def split_photos(
    subjects: Sequence[Subject], held_out: Collection[str], num_references: int
) -> Splits:
    """Every photo (with the next ones, if there are several references) with every template.

    Held out are some subjects, or of a single one a fifth of its templates. Another fifth of the
    templates is for validation, on the subjects that are trained.
    """
    has_masks = _have_masks([photo for subject in subjects for photo in subject.photos])
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
                    masks=tuple(map(mask_of, references)) if has_masks else (),
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


def _have_masks(photos: Sequence[Path]) -> bool:
    """Whether masks lie beside the photos: all have one, or none has.

    Raises:
        DataError: if some have one, or a name is not UTF-8.
    """
    if odd := [photo for photo in photos if not is_clean(str(photo))]:
        raise DataError(f"{str(odd[0])!a}: must have a name in UTF-8; rename it")
    bare = [photo for photo in photos if not mask_of(photo).exists()]
    if 0 < len(bare) < len(photos):
        raise DataError(
            f"{bare[0]}: must have a mask {mask_of(bare[0]).name}, as {len(photos) - len(bare)} "
            "other photos have one; draw it, or remove the masks"
        )
    return not bare


def mask_of(photo: Path) -> Path:
    """Where the mask of a photo lies: NAME.mask.png for NAME.jpg."""
    return photo.with_name(photo.stem + MASK)


def _references(subject: Subject, count: int) -> list[tuple[Path, ...]]:
    """Every photo with the next ones, the first following the last."""
    photos = subject.photos
    if len(photos) < count:
        raise DataError(
            f"{subject.name}: must have at least num_references = {count} photos, got "
            f"{len(photos)}; add some, or lower num_references"
        )
    return [(photos[i:] + photos[:i])[:count] for i in range(len(photos))]
