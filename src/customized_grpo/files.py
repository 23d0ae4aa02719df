"""Files and folders that are there as a whole or not at all, even after a power cut."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # others may write it too
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fills a temporary folder beside ``folder`` and puts it in its place."""
    temporary = folder.with_name(folder.name + ".tmp")
    with filled(temporary):
        write(temporary)
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)
    sync(folder.parent)


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
