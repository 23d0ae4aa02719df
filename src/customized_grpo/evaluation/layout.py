"""Pictures without a manifest, as repositories of DreamBooth's kind lay them out.

``SUBJECT/PROMPT/SEED.png``: the prompt's folder is its words, with anything between them, and its
pictures in the order of their numbers are those of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
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
        DataError: if there are pictures of other subjects or prompts, or more than are asked for.
    """
    files = find_pictures(folder, items)
    used = set(files.values())
    if files and (surplus := [p for p in _pictures(folder) if p not in used]):
        names = ", ".join(p.relative_to(folder).as_posix() for p in surplus[:_NAMED])
        raise DataError(
            f"{folder}: must hold pictures of the benchmark's subjects and prompts only, "
            f"num_images of each, got {len(surplus)} others: {names}; remove them, set num_images, "
            "or write a manifest"
        )
    return files


def find_pictures(folder: Path, items: Sequence[Item]) -> dict[tuple[Any, ...], Path]:
    """Key of an item -> its picture, of those that are there.

    Raises:
        DataError: if prompts have several references, which no name tells apart.
    """
    names, files, taken = Names(), {}, set[Path]()
    prompts: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        prompts.setdefault((item.subject, item.prompt), []).append(item)
    for (subject, prompt), group in prompts.items():
        place = names.find(folder / subject)
        for path in place.iterdir() if place and place.is_dir() else ():
            if path.is_dir() and _words(path.name) == _words(prompt):
                _check_references(folder, group)
                if path in taken:
                    raise DataError(f"{path}: must be of one prompt, got two; write a manifest")
                taken.add(path)
                pictures = sorted(photos_in(path), key=_number)
                ordered = sorted(group, key=lambda item: item.index)
                files |= {i.key: p for i, p in zip(ordered, pictures, strict=False)}
    return files


def expected_file(item: Item) -> str:
    """Where a picture of an item is looked for, in names that every system takes."""
    prompt = "_".join(_words(item.prompt))[:_LONGEST]
    references = "+".join(Path(name).stem for name in item.references)
    return f"{item.subject}/{prompt}/{references}-{item.index}.png"


def _check_references(folder: Path, group: Sequence[Item]) -> None:
    if len({item.references for item in group}) > 1:
        raise DataError(
            f"{folder}: must have a manifest where a prompt has several references, of which its "
            f"pictures have to name theirs, got none ({group[0].subject}); see --write-manifest"
        )


def _pictures(folder: Path) -> Iterator[Path]:
    for place in sorted(folder.glob("*/*")):
        if place.is_dir():
            yield from photos_in(place)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", alike_name(text).replace("_", " "))


def _number(path: Path) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"[0-9]+", path.stem)], path.name
