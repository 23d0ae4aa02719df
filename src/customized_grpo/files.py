"""Files and environment variables: read as users' editors and systems leave them, written whole or
not at all, even where the power is cut.

`tests/test_inputs.py` finds every caller of the readers and feeds it the encodings, line ends,
cases and lengths that editors and operating systems make.
"""

from __future__ import annotations

import codecs
import errno
import os
import secrets
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from customized_grpo.errors import ConfigError, DataError

LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file of a LoRA."""

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


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part."""
    # Others may write it too, in containers with process ids like this one's.
    temporary = path.with_name(f"{path.name}.{secrets.randbits(64)}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # what was wrong is worth more
            temporary.unlink()  # half a file would fill a full disk further
        if isinstance(error, OSError) and error.strerror:  # of a full disk it names none
            error.filename = str(path)
        raise
    sync(path.parent)


def append_line(path: Path, line: str) -> None:
    """Appends a line in one piece, so that writers of one file do not disturb each other.

    Raises:
        OSError: also if there was room for a part of it only, which is taken back.
    """
    content = f"{line}\n".encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        if (written := os.write(descriptor, content)) < len(content):
            end = os.lseek(descriptor, 0, os.SEEK_CUR)
            if os.fstat(descriptor).st_size == end:  # or the next line would be glued to it
                os.ftruncate(descriptor, end - written)
            raise OSError(errno.ENOSPC, "a line was written in part", str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fills a temporary folder beside ``folder`` and puts it in its place.

    For folders inside a run, where NAME.tmp and NAME.old are left-overs, which a resume removes.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    _fill(temporary, write)
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        remove(old)
        folder.rename(old)
        temporary.rename(folder)
        remove(old)
    else:
        temporary.rename(folder)
    sync(folder.parent)


def remove(path: Path) -> None:
    """Deletes a file, a folder with all in it, or a link without what it leads to; or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fills a temporary folder and puts it where ``folder`` is missing or empty.

    For folders that users name: whatever lies beside them is theirs. A link leads to where it is
    written.

    Raises:
        OSError: also if something is in the folder.
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".cgrpo-", dir=folder.parent) as aside:
        temporary = Path(aside, folder.name)
        _fill(temporary, write)
        temporary.rename(folder)  # which takes the place of an empty folder
    sync(folder.parent)


def _fill(folder: Path, write: Callable[[Path], None]) -> None:
    with filled(folder):
        write(folder)
    for path in [*folder.rglob("*"), folder]:
        sync(path)


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """An empty folder inside; if it cannot be filled, nothing is left of it to take up space.

    Who may read its files is as the umask says: safetensors 0.8 writes for the owner alone.

    Raises:
        OSError: also where safetensors raises an error of its own, on a full disk for example.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise OSError(errno.EIO, str(error), str(folder)) from error
        raise
    mode = folder.stat().st_mode & 0o666  # the folder was made by the umask
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
