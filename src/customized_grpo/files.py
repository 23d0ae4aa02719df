"""Files and folders that are there as a whole or not at all, even after a power cut."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file of a LoRA."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # others may write it too
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fills a temporary folder beside ``folder`` and puts it in its place.

    For folders inside a run, where NAME.tmp and NAME.old are left-overs, which a resume removes.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    _fill(temporary, write)
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)
    sync(folder.parent)


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


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
