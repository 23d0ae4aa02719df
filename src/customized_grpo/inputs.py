"""What users bring: text files, files by name, environment variables; the one way in for each.

`tests/test_inputs.py` finds every caller and feeds it the encodings, line ends, cases and lengths
that editors and operating systems make.
"""

from __future__ import annotations

import codecs
import os
import unicodedata
from pathlib import Path

from customized_grpo.errors import ConfigError, DataError

_BOM = "\ufeff"
_OTHER_BOMS = (  # the longer first, as the shorter ones begin like them
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def load_text(path: Path, max_bytes: int | None = None) -> str:
    """A whole text file in UTF-8; a byte order mark is left out, line ends become newlines.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no regular file, longer than ``max_bytes``, or no UTF-8: naming the
            line.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is a folder, a pipe or a device")
    with path.open("rb") as file:
        content = file.read() if max_bytes is None else file.read(max_bytes + 1)
    if max_bytes is not None and len(content) > max_bytes:
        raise ValueError(f"longer than {max_bytes:,} bytes")
    text = _decode(content).removeprefix(_BOM)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decode(content: bytes) -> str:
    fix = "save the file as UTF-8"
    for bom, name in _OTHER_BOMS:
        if content.startswith(bom):
            raise ValueError(f"not UTF-8 text but {name}; {fix}")
    if (nul := content.find(b"\0")) >= 0:
        raise ValueError(f"line {_line(content, nul)} holds a nul byte, which text has not; {fix}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ValueError(
            f"line {_line(content, error.start)} is not UTF-8 text (byte 0x{byte:02x}); {fix}"
        ) from error


def _line(content: bytes, place: int) -> int:
    before = content[:place].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return 1 + before.count(b"\n")


def read_text(path: Path, where: str | None = None) -> str:
    """See load_text; ``where`` opens the message of an error, None: the path.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        return load_text(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{where or path}: cannot be read: {error}") from error


def read_variable(name: str) -> str:
    """Value of an environment variable without what files of variables leave around it, or ''."""
    return os.environ.get(name, "").strip().strip(_BOM).strip()


def read_number(name: str, default: int) -> int:
    """A whole number that a launcher such as torchrun leaves in an environment variable.

    Raises:
        ConfigError: if it is none.
    """
    text = read_variable(name) or str(default)
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(
            f"the environment variable {name} must be a whole number, got {text[:60]!a}; unset it, "
            "or start with torchrun, which sets it"
        )
    return int(text)


class Names:
    """Finds files by name as Windows and macOS do, where the names were written: in any case,
    accents composed or not, and with backslashes. Folders are listed once."""

    def __init__(self) -> None:
        self._listed: dict[Path, dict[str, list[Path]]] = {}

    def find(self, path: Path) -> Path | None:
        """The file or folder of that very name, or the one alike; None: there is none.

        Raises:
            DataError: if several are alike.
        """
        if os.path.lexists(path):
            return path
        if "\\" in path.name:
            return self.find(path.parent.joinpath(*path.name.split("\\")))
        folder = self.find(path.parent) if path.parent != path else None
        if folder is None:
            return None
        alike = self._list(folder).get(alike_name(path.name), [])
        if len(alike) > 1:
            raise DataError(
                f"{path}: must be one file, got {' and '.join(sorted(p.name for p in alike))}, "
                "which differ in case or accents only; rename one"
            )
        return alike[0] if alike else None

    def _list(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._listed:
            names: dict[str, list[Path]] = {}
            for path in folder.iterdir() if folder.is_dir() else ():
                names.setdefault(alike_name(path.name), []).append(path)
            self._listed[folder] = names
        return self._listed[folder]


def alike_name(name: str) -> str:
    """The same text for names that differ in case or in how accents are written only."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
