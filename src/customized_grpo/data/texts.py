"""Text files of data sets, and the paths in them: refused where they are not what they claim."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from customized_grpo.config.decoding import is_clean
from customized_grpo.errors import DataError
from customized_grpo.files import Names, read_text


def parse_json(where: str, text: str) -> Any:
    """Any JSON value, strictly: no NaN, no key twice.

    Raises:
        DataError: if the text is none.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON: {error}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} twice; keep one")
    return found


def parse_object(where: str, text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: if the text is none.
    """
    row = parse_json(where, text)
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be an object, got {type(row).__name__}")
    return row


def read_objects(path: Path, where: str | None = None) -> dict[str, dict[str, Any]]:
    """The lines of a JSONL file, ``FILE:NUMBER`` -> object; empty lines are left out.

    Raises:
        DataError: if the file cannot be read, opening with ``where``, or a line is no object.
    """
    lines = read_text(path, where).split("\n")  # not splitlines: JSON may hold Unicode's line ends
    return {
        f"{path}:{number}": parse_object(f"{path}:{number}", line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    }


def check_text(where: str, row: dict[str, Any], key: str) -> str:
    """A string with something in it, without spaces around it.

    Raises:
        DataError: if it is none.
    """
    value = row.get(key)
    if not isinstance(value, str) or not value.strip() or not is_clean(value):
        raise DataError(
            f"{where}: {key}: must be a non-empty string without nul bytes and lone surrogates, "
            f"got {short(value)}"
        )
    return value.strip()


def check_list(where: str, row: dict[str, Any], key: str, of: str) -> list[str]:
    """A list of at least one string.

    Raises:
        DataError: if it is none; ``of`` says what the strings are.
    """
    items = row.get(key)
    if not isinstance(items, list) or not items or not all(isinstance(i, str) for i in items):
        raise DataError(f"{where}: {key}: must be a list of at least one {of}, got {short(items)}")
    if odd := [item for item in items if not is_clean(item)]:
        raise DataError(
            f"{where}: {key}: must have no nul bytes and lone surrogates, got {short(odd[0])}"
        )
    return items


def inside(where: str, root: Path, name: str, names: Names) -> Path:
    """The path ``name`` from ``root``, as ``names`` finds it, or as it is where nothing is.

    Links are followed: whoever could put one there could have put the file.

    Raises:
        DataError: if it leads out of ``root``.
    """
    given = names.find(root / name) or root / name
    path, folder = os.path.abspath(given), os.path.abspath(root)
    if os.path.commonpath([path, folder]) != folder:
        raise DataError(
            f"{where}: must stay in the folder {folder}, got {short(name)}; move the file there, "
            "or set root to a folder that holds all of them"
        )
    return given


def short(value: Any) -> str:
    """A value as a message shows it, on one line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
