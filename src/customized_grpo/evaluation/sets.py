"""The benchmarks: DreamBench from its folder, the emoji world's held-out examples, your own."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customized_grpo.config import DreamBenchSet, EmojiSet, JsonlSet
from customized_grpo.data.dreambench import UNO_REFERENCES, is_live, read_subjects
from customized_grpo.data.emoji.source import EmojiConfig
from customized_grpo.data.emoji.world import PLACEMENTS, Attributes, EmojiWorld, attribute_values
from customized_grpo.data.images import File, check_pictures
from customized_grpo.data.sidecars import Sidecars
from customized_grpo.data.templates import PLACEHOLDER, fill
from customized_grpo.data.texts import check_list, check_text, inside, read_objects, short
from customized_grpo.errors import ConfigError, DataError, within
from customized_grpo.evaluation.items import (
    BenchmarkSet,
    Item,
    Photo,
    PhotographedSubject,
    Rendered,
)
from customized_grpo.files import Names
from customized_grpo.registry import nearest, one_of

_VIEWS = 3  # plain pictures of an emoji besides the references of its examples
_VIEW_SEED = 20_261_125


def build_set(config: DreamBenchSet | EmojiSet | JsonlSet, num_images: int) -> BenchmarkSet:
    """Reads a benchmark and checks every photo of it.

    Raises:
        ConfigError: if a field does not fit what is there.
        DataError: naming what is missing or unreadable.
    """
    if isinstance(config, DreamBenchSet):
        return _dreambench(config, num_images)
    if isinstance(config, EmojiSet):
        return _emoji(config, num_images)
    return _jsonl(config, num_images)


def _dreambench(config: DreamBenchSet, num_images: int) -> BenchmarkSet:
    with within("benchmark"):
        read = read_subjects(config.path)
    checked = read_photos([photo for subject in read for photo in subject.photos], config.path)
    subjects = {
        subject.name: PhotographedSubject(
            name=subject.name,
            words=subject.words,
            kind="live" if is_live(subject.words) else "object",
            photos=tuple(checked[path] for path in subject.photos),
        )
        for subject in read
    }
    chosen = _references(config.reference, subjects)
    items = (
        Item(
            subject=subject.name,
            prompt_index=number,
            prompt=fill(template, subject.words),
            kind=subjects[subject.name].kind,
            category=category_of(template),
            references=(reference,),
            index=index,
        )
        for subject in read
        for number, template in enumerate(subject.templates)
        for reference in chosen[subject.name]
        for index in range(num_images)
    )
    rule = {
        "first": "the first photo by name",
        "all": "every photo in turn",
        "uno": "the one in UNO's list",
    }
    return BenchmarkSet(
        type=config.type,
        subjects=subjects,
        items=tuple(items),
        rules={
            "prompt": "the published list for the class, without the unique token",
            "reference": rule.get(str(config.reference), "as named, else the first photo by name"),
            "category": "property: a word before the subject; accessory: wearing or an outfit; "
            "context: the others",
        },
    )


def category_of(template: str) -> str:
    """Category of one of DreamBench's templates, read off its words.

    A word between the article and the subject is a property ("a red {subject}"); wearing something
    or an outfit is an accessory; everything else says where the subject is: a context.
    """
    if not re.match(rf"^an? {re.escape(PLACEHOLDER)}", template):
        return "property"
    return "accessory" if re.search(r"\b(wearing|outfit)\b", template) else "context"


def _references(
    rule: str | dict[str, str], subjects: Mapping[str, PhotographedSubject]
) -> dict[str, list[str]]:
    """Subject -> photos that are references, each for pictures of its own."""
    names = {name: [photo.name for photo in s.photos] for name, s in subjects.items()}
    if rule == "all":
        return names
    if rule == "uno":
        rule = {name: photo for name, photo in UNO_REFERENCES.items() if name in names}
    chosen = {name: [min(photos)] for name, photos in names.items()}
    for name, photo in (rule if isinstance(rule, dict) else {}).items():
        if name not in names:
            fix = nearest(name, names) or one_of(names)
            raise ConfigError(f"benchmark.reference: must name subjects, got {name!r}; {fix}")
        if photo not in names[name]:
            raise ConfigError(
                f"benchmark.reference.{name}: must be a photo of it, got {photo!r}; "
                f"{one_of(names[name])}"
            )
        chosen[name] = [photo]
    return chosen


def read_photos(paths: Sequence[Path], where: str) -> dict[Path, Photo]:
    """Photos with the masks that lie beside them (NAME.mask.png), read to their end.

    Raises:
        DataError: naming the first one that is unreadable.
    """
    beside = Sidecars()
    masks = {path: mask for path in paths if (mask := beside.mask_of(path))}
    files: dict[File, str] = {(path, "RGB"): where for path in paths}
    files.update({(mask, "L"): where for mask in masks.values()})
    checked = check_pictures(files)

    def read(path: Path) -> Photo:
        mask = masks.get(path)
        return Photo(
            name=path.name,
            picture=checked[path, "RGB"],
            mask=None if mask is None else checked[mask, "L"],
            digest=digest_of_files([path] if mask is None else [path, mask]),
        )

    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(read, paths), strict=True))


def digest_of_files(files: Sequence[Path]) -> str:
    """SHA-256 of what is in them."""
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(file.read_bytes())
        except OSError as error:
            raise DataError(f"{file}: must be readable, got {error.strerror}; restore it") from None
    return digest.hexdigest()


def _rendered(name: str, picture: Tensor, mask: Tensor) -> Photo:
    digest = hashlib.sha256(picture.numpy().tobytes() + mask.numpy().tobytes()).hexdigest()
    return Photo(name=name, picture=Rendered(picture), mask=Rendered(mask), digest=digest)


def _emoji(config: EmojiSet, num_images: int) -> BenchmarkSet:
    examples = EmojiConfig().build(0).held_out(config.num_examples)
    photos: dict[str, list[Photo]] = {}
    names = [f"example-{number:04d}" for number in range(len(examples))]
    for name, example in zip(names, examples, strict=True):
        assert example.reference_masks is not None
        photo = _rendered(name, example.references[0], example.reference_masks[0])
        photos.setdefault(example.subject, []).append(photo)
    for name, views in _views(list(photos)):
        photos[name] += views
    items = (
        Item(
            subject=example.subject,
            prompt_index=number,
            prompt=example.prompt,
            category=_emoji_category(example.attributes),
            references=(names[number],),
            index=index,
        )
        for number, example in enumerate(examples)
        for index in range(num_images)
    )
    return BenchmarkSet(
        type=config.type,
        subjects={
            name: PhotographedSubject(name=name, words=name, photos=tuple(some))
            for name, some in photos.items()
        },
        items=tuple(items),
        rules={
            "reference": "the plain picture of the example",
            "photos": f"the references of the subject's examples and {_VIEWS} plain views",
            "category": "what the prompt asks for besides scene and place",
        },
    )


def _views(names: Sequence[str]) -> Iterator[tuple[str, list[Photo]]]:
    """Plain pictures of subjects in scenes of their own."""
    world = EmojiWorld("held_out")
    places = {subject.name: index for index, subject in enumerate(world.subjects)}
    random = torch.Generator().manual_seed(_VIEW_SEED)
    for name in names:
        none = torch.zeros(_VIEWS, dtype=torch.int64)
        scene = torch.randperm(len(attribute_values("scene")), generator=random)[:_VIEWS]
        placement = torch.randint(len(PLACEMENTS), (_VIEWS,), generator=random)
        plain = Attributes(scene=scene, placement=placement, prop=none, color=none, accessory=none)
        images, masks = world.render(torch.full((_VIEWS,), places[name]), plain, random)
        yield name, [_rendered(f"view-{i}", images[i], masks[i]) for i in range(_VIEWS)]


def _emoji_category(attributes: Mapping[str, str]) -> str:
    kinds = {"prop": "context", "color": "property", "accessory": "accessory"}
    asked = [kind for name, kind in kinds.items() if attributes[name] != "none"]
    return asked[0] if len(asked) == 1 else "combined"


_KEYS = ("subject", "prompt", "references", "photos", "class", "kind", "category")


def _jsonl(config: JsonlSet, num_images: int) -> BenchmarkSet:
    path = Path(config.path)
    root = path.parent if config.root is None else Path(config.root)
    rows = read_objects(path, f"benchmark.path: {path}")
    if not rows:
        raise DataError(f"{path}: must hold at least one prompt, got none")
    for where, row in rows.items():
        _check_row(where, row)
    subjects = _jsonl_subjects(rows, root, str(path))
    items = tuple(_jsonl_items(rows.values(), subjects, num_images))
    rules = {"reference": "as the file says", "photos": "as the file says, or else the references"}
    return BenchmarkSet(type=config.type, subjects=subjects, items=items, rules=rules)


def _jsonl_items(
    rows: Iterable[dict[str, Any]], subjects: Mapping[str, PhotographedSubject], num_images: int
) -> Iterator[Item]:
    counts = dict.fromkeys(subjects, 0)
    for row in rows:
        subject = row["subject"].strip()
        for index in range(num_images):
            yield Item(
                subject=subject,
                prompt_index=counts[subject],
                prompt=row["prompt"].strip(),
                kind=subjects[subject].kind,
                category=row.get("category", "").strip(),
                references=tuple(row["references"]),
                index=index,
            )
        counts[subject] += 1


def _check_row(where: str, row: dict[str, Any]) -> None:
    if unknown := row.keys() - set(_KEYS):
        known = ", ".join(_KEYS)
        raise DataError(f"{where}: unknown key {short(min(unknown))}; known are {known}")
    for key in ("subject", "prompt", "class", "kind", "category"):
        if key in row or key in ("subject", "prompt"):
            check_text(where, row, key)
    for key in ("references", "photos"):
        if key in row or key == "references":
            check_list(where, row, key, "path")


def _jsonl_subjects(
    rows: Mapping[str, dict[str, Any]], root: Path, source: str
) -> dict[str, PhotographedSubject]:
    """Subjects by first mention; their photos are all that any of their lines names."""
    names: dict[str, dict[str, Path]] = {}
    words: dict[str, dict[str, str]] = {}
    found = Names()
    for where, row in rows.items():
        subject = row["subject"].strip()
        for key in ("references", "photos"):
            for name in row.get(key, ()):
                if (plain := posixpath.normpath(name)) != name:  # two names would be two photos
                    raise DataError(
                        f"{where}: {key}: must be written plainly, got {name!r}; write {plain!r}"
                    )
                file = inside(f"{where}: {key}", root, name, found)
                if file != root / name:
                    raise DataError(
                        f"{where}: {key}: must be written as the file is called, got {name!r}; "
                        f"write {file.relative_to(root).as_posix()!r}"
                    )
                names.setdefault(subject, {}).setdefault(name, file)
        said = words.setdefault(subject, {})
        for key in ("class", "kind"):
            text = row.get(key, "").strip()
            if text and said.setdefault(key, text) != text:
                raise DataError(
                    f"{where}: {key}: must be the same on all lines of {subject!r}, got "
                    f"{text!r} and {said[key]!r}; keep one"
                )
    photos = read_photos([f for files in names.values() for f in files.values()], source)
    return {
        subject: PhotographedSubject(
            name=subject,
            words=words[subject].get("class", subject),
            kind=words[subject].get("kind", ""),
            photos=tuple(replace(photos[file], name=name) for name, file in files.items()),
        )
        for subject, files in names.items()
    }
