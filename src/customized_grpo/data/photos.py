"""Photos of subjects times prompt templates: what ``folder`` and ``dreambench`` have in common."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import gcd
from pathlib import Path

from customized_grpo.config.decoding import is_clean
from customized_grpo.data.images import HEIC_SUFFIXES, alpha_of, opened, suffixes
from customized_grpo.data.listed import Splits
from customized_grpo.data.rows import Row, read_rows
from customized_grpo.data.sidecars import MASK, SUBJECT, Sidecars, is_sidecar
from customized_grpo.data.splits import scattered, sort_into_splits
from customized_grpo.data.templates import fill
from customized_grpo.data.texts import short
from customized_grpo.errors import DataError
from customized_grpo.files import alike_name

_MASK_ENDING = re.compile(r"(.+)[-_. ](mask|masklabel|matte|seg|segmentation)s?")
_CACHE = re.compile(r"_\w+_cache")  # folders that ai-toolkit leaves among the photos
_WHY_NOT = {
    "HEIC, which needs the extra [heic]; install it or save it as JPEG": " ".join(HEIC_SUFFIXES),
    "a camera's raw file; export it as JPEG": ".dng .cr2 .cr3 .nef .arw .orf .rw2 .raf",
    "a film; save single pictures of it as JPEG": ".mp4 .mov .avi .mkv .webm .m4v",
    "a text that is no caption in use: of no photo here, or captions are not read": ".txt .caption",
    "JSON, whose captions are not read; write each into NAME.txt": ".json .jsonl",
    "a cache of another trainer": ".npz .safetensors .pt",
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
    captions: Mapping[str, frozenset[Path]] = field(default_factory=dict)
    """Prompts besides the templates -> the photos that they describe."""
    sidecars: Sidecars = field(default_factory=Sidecars)
    repeats: int = 1
    """How often its photos count in training."""
    members: tuple[Subject, ...] = ()
    """Of a group, which has no photos of its own: subjects that are to be in one picture."""

    @classmethod
    def group(cls, members: Sequence[Subject], templates: tuple[str, ...]) -> Subject:
        """Several as one."""
        return cls(
            name="+".join(member.name for member in members),
            words=" and ".join(member.words for member in members),
            photos=(),
            templates=templates,
            members=tuple(members),
        )

    def references(self, prompt: str, count: int) -> list[tuple[Path, ...]]:
        """Every photo that goes with a prompt, with the next ones; the first follows the last.

        A photo that the prompt describes does not: to copy it would be the best answer. Of a group:
        those of each member, one member after the other.
        """
        if self.members:
            each = [member.references(prompt, count) for member in self.members]
            turns = range(max(map(len, each)) if all(each) else 0)
            return [tuple(p for some in each for p in some[i % len(some)]) for i in turns]
        own = self.captions.get(prompt, ())
        photos = tuple(photo for photo in self.photos if photo not in own)
        if len(photos) < count:
            return []
        return [(photos[i:] + photos[:i])[:count] for i in range(len(photos))]


def photos_in(folder: Path) -> tuple[Path, ...]:
    """The photos of a folder, by name; masks and pictures to be conditioned on are not among them.

    Raises:
        DataError: if one looks like a mask as another program names it.
    """
    photos = tuple(
        sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in suffixes()
            and not is_sidecar(path)
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
        elif is_sidecar(path):
            yield path, "a mask without a photo of its name, or a picture to be conditioned on"
        else:
            yield path, reasons.get(path.suffix.lower(), unreadable)


def remarks_on(
    subjects: Sequence[Subject], num_references: int, *, alpha: bool = False
) -> list[str]:
    """A line for each subject: what of its folder is used, and what is not and why."""
    return ["; ".join(_remarks(subject, num_references, alpha)) for subject in subjects]


def _remarks(subject: Subject, num_references: int, alpha: bool) -> Iterator[str]:
    beside = subject.sidecars
    masks = [mask for photo in subject.photos if (mask := beside.mask_of(photo))]
    files = [file for photo in subject.photos for file in beside.captions_of(photo)]
    alone = [c for c in subject.captions if not subject.references(c, num_references)]
    counts = {"captions": len(subject.captions) - len(alone)}
    counts |= {"templates": len(subject.templates) if files else 0, "masks": len(masks)}
    counts |= {"masks in their alpha channels": len(subject.photos) if alpha else 0}
    used = [f"{len(subject.photos)} photos", *(f"{n} {what}" for what, n in counts.items() if n)]
    used += [f"each counts {subject.repeats} times"] if subject.repeats > 1 else []
    yield f"{subject.name} ({subject.words!r}): {', '.join(used)}"
    if alone:
        yield (
            f"{len(alone)} captions not used, such as {short(alone[0])}: too few photos are left "
            "that it does not describe, and to copy one that it does would be the best answer"
        )
    others: dict[str, list[str]] = {}
    known = {*subject.photos, *files, *masks, *(mask.parent for mask in masks)}
    for path, why in left_out(subject.photos[0].parent, known):
        others.setdefault(why, []).append(path.name)
    yield from (f"{len(n)} not used, such as {n[0]}: {why}" for why, n in others.items())


def is_subject(path: Path, masks: Path | None) -> bool:
    """Whether a path is the folder of a subject: not of its masks, nor hidden, nor a cache."""
    name = path.name
    hidden = name.startswith(".") or _CACHE.fullmatch(name)
    return path.is_dir() and not hidden and not (masks and masks.samefile(path))


def check_folders(folders: Sequence[Path]) -> None:
    """Raises a DataError if one of the subjects' folders looks like the masks of another."""
    names = {alike_name(folder.name) for folder in folders}
    for folder in folders:
        name = alike_name(folder.name)
        found = _MASK_ENDING.fullmatch(name)
        if name in ("mask", "masks") or (found and found[1] in names):
            raise DataError(
                f"{folder}: looks like masks and would be trained on as a subject; name it in "
                f"mask_path, put each beside its photo as NAME{MASK}, or rename the folder"
            )


def split_photos(
    subjects: Sequence[Subject],
    held_out: Collection[str],
    num_references: int,
    *,
    alpha: bool = False,
    by_prompt: bool = False,
) -> Splits:
    """Every photo (with the next ones, if there are several references) with every prompt.

    Held out are some subjects, or of a single one a fifth of its prompts. Another fifth of the
    prompts is for validation, on the subjects that are trained.

    Args:
        subjects: all of them; groups may be among them.
        held_out: names of some, and so of the groups that they are in.
        num_references: photos of an example, of a group of each of its members.
        alpha: masks are the alpha channels of the photos.
        by_prompt: hold prompts out though there are several subjects.

    Raises:
        DataError: naming the first file that cannot be used.
    """
    masks = _masks(subjects)
    if alpha:
        _check_alpha([photo for subject in subjects for photo in subject.photos], masks)
    rows, parts, counts = [], [], []
    single = by_prompt or len(subjects) == 1
    for subject in subjects:
        for prompt, part in _parts(subject, num_references, single=single).items():
            for references in subject.references(prompt, num_references):
                shown = references if subject.members else references[:1]
                row = Row(
                    where=str(references[0].parent),
                    id=f"{subject.name}/{'+'.join(photo.name for photo in shown)}/{prompt}",
                    prompt=fill(prompt, subject.words),
                    subject=subject.words,
                    reference_subjects=tuple(
                        member.words for member in subject.members for _ in range(num_references)
                    ),
                    references=references,
                    masks=tuple(masks[photo] for photo in references) if masks else (),
                    cut_outs=references if alpha else (),
                )
                rows.append(row)
                names = (subject.name, *(member.name for member in subject.members))
                parts.append("held_out" if any(n in held_out for n in names) else part)
                counts.append(subject.repeats)
    splits = sort_into_splits(read_rows(rows, "photos"), parts)
    if not splits.training or not splits.held_out:
        raise DataError(
            "held_out: must leave something to train on and something to hold out, got "
            f"{len(splits.training)} and {len(splits.held_out)} examples; name other subjects "
            "or add photos or templates"
        )
    repeats = [n for n, part in zip(counts, parts, strict=True) if part == "training"]
    least = gcd(*repeats)
    training = [e for e, n in zip(splits.training, repeats, strict=True) for _ in range(n // least)]
    return replace(splits, training=training)


def some_subjects(names: Collection[str]) -> frozenset[str]:
    """A fifth of the subjects, at least one; of a single subject none is held out."""
    return frozenset(scattered(names, str)[: max(1, len(names) // SHARE)] if len(names) > 1 else ())


def _parts(subject: Subject, num_references: int, *, single: bool) -> dict[str, str]:
    """Prompt -> split."""
    prompts = dict.fromkeys((*subject.templates, *subject.captions))
    order = scattered((p for p in prompts if subject.references(p, num_references)), str)
    if not order:
        raise DataError(
            f"{subject.name}: must have at least num_references = {num_references} photos, got "
            f"{len(subject.photos)}; add some, or lower num_references"
        )
    fifth = len(order) // SHARE
    part = dict.fromkeys(prompts, "training")
    part |= dict.fromkeys(order[:fifth], "validation")
    if single:
        part |= dict.fromkeys(order[fifth : fifth + max(1, fifth)], "held_out")
    return part


def _masks(subjects: Sequence[Subject]) -> dict[Path, Path]:
    """The masks of the photos: all have one, or none has.

    Raises:
        DataError: if some have one, or a name is not UTF-8.
    """
    photos = {photo: subject.sidecars for subject in subjects for photo in subject.photos}
    if odd := [photo for photo in photos if not is_clean(str(photo))]:
        raise DataError(f"{str(odd[0])!a}: must have a name in UTF-8; rename it")
    masks = {photo: mask for photo, beside in photos.items() if (mask := beside.mask_of(photo))}
    places: dict[Path, Path] = {}
    for photo, mask in masks.items():
        if (other := places.setdefault(mask, photo.parent)) != photo.parent:
            raise DataError(
                f"{mask}: must be the mask of one photo, got {photo.name} of {other.name} and of "
                f"{photo.parent.name}; put the masks of each subject into a folder of its name"
            )
    bare = [photo for photo in photos if photo not in masks]
    if bare and (masks or photos[bare[0]].mask_path):
        wanted = photos[bare[0]].expected_mask(bare[0])
        raise DataError(
            f"{bare[0]}: must have a mask {wanted}, as {len(masks)} other photos have one; draw "
            "it, or leave the masks out"
        )
    return masks


def _check_alpha(photos: Sequence[Path], masks: Collection[Path]) -> None:
    """Raises a DataError if a photo has no alpha channel that says anything, or a mask besides."""
    for photo in photos:
        if photo in masks:
            raise DataError(
                f"{photo}: must have one mask, got a file and, by alpha_mask, its alpha channel; "
                "remove the file or set alpha_mask: false"
            )
    with ThreadPoolExecutor() as pool:
        list(pool.map(_check_transparency, photos))


def _check_transparency(photo: Path) -> None:
    with opened(photo, str(photo)) as image:
        if alpha_of(image, str(photo)) is None:
            opaque = ", opaque everywhere" if image.has_transparency_data else ""
            raise DataError(
                f"{photo}: must have an alpha channel for alpha_mask, transparent where the "
                f"subject is not, got mode {image.mode}{opaque}; save it as a PNG with one, or set "
                "alpha_mask: false"
            )
