"""Photos of subjects times prompt templates: what ``folder`` and ``dreambench`` have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from customized_grpo.config.decoding import is_clean
from customized_grpo.data.images import File, Picture, check_pictures
from customized_grpo.data.jsonl import check_masks
from customized_grpo.data.listed import Entry, Splits, check_entries
from customized_grpo.data.splits import scattered, scattered_entries
from customized_grpo.data.templates import fill
from customized_grpo.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
MASK = ".mask.png"
SHARE = 5  # one in so many templates, subjects or prompts is held out


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One subject: its photos and what may be asked of it."""

    name: str
    """Of its folder; unique."""
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
    pictures = check_pictures(_files(subjects))
    parts: dict[str, list[Entry]] = {"training": [], "held_out": [], "validation": []}
    for subject in subjects:
        parts_of = _parts(subject, single=len(subjects) == 1)
        references = list(_references(subject, num_references, pictures))
        for template, part in parts_of.items():
            part = "held_out" if subject.name in held_out else part
            parts[part] += [
                Entry(
                    id=f"{subject.name}/{name}/{template}",
                    prompt=fill(template, subject.words),
                    subject=subject.words,
                    references=chosen,
                    masks=masks,
                )
                for name, chosen, masks in references
            ]
    if not parts["training"] or not parts["held_out"]:
        raise DataError(
            "held_out: must leave something to train on and something to hold out, got "
            f"{len(parts['training'])} and {len(parts['held_out'])} examples; name other subjects "
            "or add photos or templates"
        )
    check_entries([*parts["training"], *parts["held_out"], *parts["validation"]], "photos")
    return Splits(
        training=parts["training"],
        held_out=scattered_entries(parts["held_out"]),
        validation=scattered_entries(parts["validation"]),
    )


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


def _files(subjects: Sequence[Subject]) -> dict[File, str]:
    """Photos, and the masks beside them: all photos have one, or none has.

    Raises:
        DataError: if some have one.
    """
    photos = [photo for subject in subjects for photo in subject.photos]
    if odd := [photo for photo in photos if not is_clean(str(photo))]:
        raise DataError(f"{str(odd[0])!a}: must have a name in UTF-8; rename it")
    masks = [mask for photo in photos if (mask := mask_of(photo)).exists()]
    if masks and len(masks) < len(photos):
        bare = next(photo for photo in photos if not mask_of(photo).exists())
        raise DataError(
            f"{bare}: must have a mask {mask_of(bare).name}, as {len(masks)} other photos have "
            "one; draw it, or remove the masks"
        )
    files: dict[File, str] = {(photo, "RGB"): str(photo.parent) for photo in photos}
    files.update({(mask, "L"): str(mask.parent) for mask in masks})
    return files


def mask_of(photo: Path) -> Path:
    """Where the mask of a photo lies: NAME.mask.png for NAME.jpg."""
    return photo.with_name(photo.stem + MASK)


def _references(
    subject: Subject, count: int, pictures: dict[File, Picture]
) -> Iterator[tuple[str, tuple[Picture, ...], tuple[Picture, ...] | None]]:
    photos = subject.photos
    if len(photos) < count:
        raise DataError(
            f"{subject.name}: must have at least num_references = {count} photos, got "
            f"{len(photos)}; add some, or lower num_references"
        )
    for first in range(len(photos)):
        chosen = [photos[(first + i) % len(photos)] for i in range(count)]
        references = tuple(pictures[photo, "RGB"] for photo in chosen)
        masks = tuple(p for photo in chosen if (p := pictures.get((mask_of(photo), "L"))))
        check_masks(str(chosen[0]), references, masks or None)
        yield photos[first].name, references, masks or None
