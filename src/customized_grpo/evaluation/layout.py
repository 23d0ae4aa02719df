"""Pictures without a manifest, as repositories of DreamBooth's kind lay them out.

``SUBJECT/PROMPT/SEED.png``: the prompt's folder is its words, with anything between them, and its
pictures in the order of their numbers are those of the prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from customized_grpo.data.photos import photos_in
from customized_grpo.errors import DataError
from customized_grpo.evaluation.items import Item
from customized_grpo.files import Names, alike_name

_NAMED = 5
_LONGEST = 80  # letters, of four bytes at most


def read_layout(folder: Path, items: Sequence[Item]) -> dict[tuple[Any, ...], Path]:
    """Key of an item -> its picture; empty if the folder is laid out in another way.

    Raises:
        DataError: if there are pictures of other subjects or prompts, more than are asked for, or
            some that no name tells apart.
    """
    files, unclear = find_pictures(folder, items)
    if unclear:
        raise DataError(unclear[0])
    used = set(files.values())
    if files and (surplus := [p for p in _pictures(folder) if p not in used]):
        names = ", ".join(p.relative_to(folder).as_posix() for p in surplus[:_NAMED])
        raise DataError(
            f"{folder}: must hold pictures of the benchmark's subjects and prompts only, "
            f"num_images of each, got {len(surplus)} others: {names}; remove them, set num_images, "
            "or write a manifest"
        )
    return files


def find_pictures(
    folder: Path, items: Sequence[Item]
) -> tuple[dict[tuple[Any, ...], Path], list[str]]:
    """Key of an item -> its picture, of those that are there; and why others cannot be told apart
    by their names."""
    names, claims = Names(), dict[Path, list[Item]]()
    prompts: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        prompts.setdefault((item.subject, item.prompt), []).append(item)
    for (subject, prompt), group in prompts.items():
        place = names.find(folder / subject)
        for path in place.iterdir() if place and place.is_dir() else ():
            if path.is_dir() and _words(path.name) == _words(prompt):
                claims.setdefault(path, []).extend(group)
    files: dict[tuple[Any, ...], Path] = {}
    unclear: list[str] = []
    for path, group in claims.items():
        if why := _why_unclear(path, group):
            unclear.append(why)
            continue
        pictures = sorted(photos_in(path), key=_number)
        ordered = sorted(group, key=lambda item: item.index)
        files |= {i.key: p for i, p in zip(ordered, pictures, strict=False)}
    return files, unclear


def manifest_files(items: Sequence[Item], found: Mapping[tuple[Any, ...], str]) -> list[str]:
    """Where the picture of every item lies, by its key, or else is to be put, each in a file of its
    own: with all of its references' names and its prompt's number where the short name is taken."""
    names = [found.get(item.key) or _expected_file(item) for item in items]
    counts = Counter(map(alike_name, names))
    return [
        name if item.key in found or counts[alike_name(name)] == 1 else _whole_name(item)
        for item, name in zip(items, names, strict=True)
    ]


def _expected_file(item: Item) -> str:
    """In names that every system takes."""
    references = "+".join(Path(name).stem for name in item.references)
    return f"{item.subject}/{_folder(item)}/{references}-{item.index}.png"


def _whole_name(item: Item) -> str:
    references = "+".join(item.references)
    return f"{item.subject}/{_folder(item)}_{item.prompt_index}/{references}-{item.index}.png"


def _folder(item: Item) -> str:
    return "_".join(_words(item.prompt))[:_LONGEST]


def _why_unclear(path: Path, group: Sequence[Item]) -> str:
    """Why the pictures in a folder cannot be told apart by their names; "" if they can."""
    if len({(item.subject, item.prompt) for item in group}) > 1:
        return f"{path}: must be of one prompt, got two; see --write-manifest"
    if len({item.references for item in group}) > 1:
        return (
            f"{path.parent.parent}: must have a manifest where a prompt has several references, of "
            f"which its pictures have to name theirs, got none ({group[0].subject}); see "
            "--write-manifest"
        )
    return ""


def _pictures(folder: Path) -> Iterator[Path]:
    for place in sorted(folder.glob("*/*")):
        if place.is_dir():
            yield from photos_in(place)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", alike_name(text).replace("_", " "))


def _number(path: Path) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"[0-9]+", path.stem)], path.name
