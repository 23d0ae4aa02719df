"""Pictures of any model: a folder with ``manifest.jsonl``, held against the benchmark's items.

One line a picture: {"subject": "dog", "prompt_index": 3, "prompt": "a dog ...", "reference":
"00.jpg", "index": 0, "file": "dog/003-0.png"}; of several references, a list.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from customized_grpo.data.images import Picture, check_pictures, kept_size, opened
from customized_grpo.data.texts import check_text, inside, read_objects, short
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.evaluation.items import BenchmarkSet, Item, Photo
from customized_grpo.evaluation.layout import find_pictures, manifest_files, read_layout
from customized_grpo.evaluation.sets import digest_of_files
from customized_grpo.files import Names, write_atomic

MANIFEST = "manifest.jsonl"
_KEYS = ("subject", "prompt_index", "prompt", "reference", "index", "file")
_NAMED = 5  # of many missing or surplus pictures, those that a message names


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """The pictures of a model, for the items that have one."""

    items: tuple[Item, ...]
    photos: tuple[Photo, ...]
    """One per item; names are paths in the folder."""
    missing: tuple[Item, ...] = ()
    """What was asked for and is not there, or cannot be read."""


def write_manifest(items: Sequence[Item], files: Sequence[str]) -> str:
    """Lines of a manifest."""
    rows = (
        {
            "subject": item.subject,
            "prompt_index": item.prompt_index,
            "prompt": item.prompt,
            "reference": item.references[0] if len(item.references) == 1 else item.references,
            "index": item.index,
            "file": file,
        }
        for item, file in zip(items, files, strict=True)
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_wanted(folder: Path, wanted: BenchmarkSet) -> tuple[Path, int]:
    """Writes the manifest of a folder; returns its path and how many of the pictures are there.

    A line names the picture that lies in the folder as ``SUBJECT/PROMPT/SEED.png``, or else where
    it would: pictures can be made for the lines, or the lines be changed to pictures. Those that
    their names do not tell apart count as not there, as that is what the manifest is for.

    Raises:
        ConfigError: if there is a manifest.
    """
    if found := Names().find(folder / MANIFEST):
        raise ConfigError(f"--write-manifest: {found} is there already; remove it to have another")
    folder.mkdir(parents=True, exist_ok=True)
    files, _ = find_pictures(folder, wanted.items)
    found = {key: file.relative_to(folder).as_posix() for key, file in files.items()}
    names = manifest_files(wanted.items, found)
    write_atomic(folder / MANIFEST, write_manifest(wanted.items, names))
    return folder / MANIFEST, len(files)


def read_outputs(folder: Path, wanted: BenchmarkSet, allow_partial: bool = False) -> Outputs:
    """The pictures of a folder, in the order of the benchmark's items.

    Everything is checked before anything is measured, but for the pixels: those are read once,
    when they are measured. With ``allow_partial`` they are read here too, so that pictures that
    cannot be read count as missing.

    Raises:
        ConfigError: if the folder has no manifest.
        DataError: naming what is missing, surplus, unreadable, of another prompt or reference, or
            outside of the folder.
    """
    manifest = Names().find(folder / MANIFEST)
    if manifest is None:
        files = read_layout(folder, wanted.items)
    else:
        files = _read_files(folder, manifest, wanted)
    if manifest is None and not files:
        raise ConfigError(
            f"images: must be a folder with {MANIFEST}, or with pictures SUBJECT/PROMPT/SEED.png, "
            f"got {str(folder)!r}; add --write-manifest to have one written"
        )
    with ThreadPoolExecutor() as pool:
        looked = pool.map(lambda file: _look(file, in_full=allow_partial), files.values())
        found = dict(zip(files, looked, strict=True))
    missing = [item for item in wanted.items if isinstance(found.get(item.key, ""), str)]
    if missing and not allow_partial:
        problems = [problem for problem in found.values() if isinstance(problem, str)]
        absent = [item for item in missing if item.key not in found]
        problems += [f"{folder}: {item.describe()}: no line" for item in absent]
        raise DataError(
            f"{_some(problems)}; {len(missing)} of {len(wanted.items)} pictures are missing or "
            "unreadable: add them, or write --allow-partial true to score the others, marked as "
            "partial"
        )
    pictures = {key: picture for key, picture in found.items() if isinstance(picture, Picture)}
    there = [item for item in wanted.items if item.key in pictures]
    if not there:
        raise DataError(f"{folder}: must hold a picture of the benchmark, got none it can use")

    def read(item: Item) -> Photo:
        file = files[item.key]
        name = Path(os.path.relpath(file, folder)).as_posix()  # either may be absolute
        return Photo(name=name, picture=pictures[item.key], digest=digest_of_files([file]))

    with ThreadPoolExecutor() as pool:
        photos = tuple(pool.map(read, there))
    return Outputs(items=tuple(there), photos=photos, missing=tuple(missing))


def _look(file: Path, in_full: bool) -> Picture | str:
    """The picture, or what is wrong with it; by the header, or by everything."""
    try:
        if in_full:
            return check_pictures({(file, "RGB"): "images"})[file, "RGB"]
        with opened(file, f"images: {file}") as image:
            return Picture(file, "RGB", *kept_size(image.height, image.width))
    except DataError as error:
        return str(error)


def _read_files(folder: Path, manifest: Path, wanted: BenchmarkSet) -> dict[tuple[Any, ...], Path]:
    """Key of an item -> its file."""
    prompts = {item.key: item.prompt for item in wanted.items}
    files: dict[tuple[Any, ...], Path] = {}
    lines: dict[Path, str] = {}
    surplus: list[str] = []
    names = Names()
    for where, row in read_objects(manifest).items():
        item = _read_item(where, row)
        file = inside(f"{where}: file", folder, check_text(where, row, "file"), names)
        if (key := item.key) not in prompts:
            surplus.append(f"{where}: {item.describe()} is not in the benchmark")
        elif key in files:
            raise DataError(f"{where}: {item.describe()}: is there twice; keep one line")
        elif item.prompt != prompts[key]:
            raise DataError(
                f"{where}: prompt: must be {prompts[key]!r}, got {short(item.prompt)}; sample with "
                "the benchmark's prompts (the unique token is left out)"
            )
        elif (first := lines.setdefault(file, where)) != where:
            raise DataError(
                f"{where}: file: must be a picture of its own, got the one of {first}; name the "
                "picture of this line"
            )
        else:
            files[key] = file
    if surplus:
        raise DataError(f"{_some(surplus)}; remove the lines, or set the benchmark accordingly")
    return files


def _read_item(where: str, row: dict[str, Any]) -> Item:
    if odd := row.keys() ^ set(_KEYS):
        what = "unknown key" if min(odd) in row else "must have the key"
        raise DataError(f"{where}: {what} {short(min(odd))}; keys are {', '.join(_KEYS)}")
    for key in ("prompt_index", "index"):
        if type(row[key]) is not int or row[key] < 0:
            raise DataError(
                f"{where}: {key}: must be a whole number from 0, got {short(row[key])}; correct it"
            )
    names = row["reference"] if isinstance(row["reference"], list) else [row["reference"]]
    if not names or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"{where}: reference: must be a photo's name or a list of them, got "
            f"{short(row['reference'])}; correct it"
        )
    return Item(
        subject=check_text(where, row, "subject"),
        prompt_index=row["prompt_index"],
        prompt=check_text(where, row, "prompt"),
        references=tuple(names),
        index=row["index"],
    )


def _some(problems: Sequence[str]) -> str:
    rest = len(problems) - _NAMED
    return "; ".join([*problems[:_NAMED], *([f"and {rest} more"] if rest > 0 else [])])
