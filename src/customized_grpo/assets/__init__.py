"""A checkpoint named in a config: where it lies, and that it may be loaded.

Weights are read from safetensors. Config files are bounded, failures of the libraries become one
line, and weights that are not finite are named.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customized_grpo.errors import ConfigError, CustomizedGRPOError

if TYPE_CHECKING:
    from torch import Tensor

_EMBEDDED = "embedded:"
_ROOT = Path(__file__).parent
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_CONFIGS = ("config.json", "scheduler_config.json", "preprocessor_config.json")
_MAX_LAYERS = 1000  # a damaged number of them would be built for hours
_MAX_SIZE = 10**8  # of anything else that a config counts


def resolve_checkpoint(path: str, field: str = "path") -> str:
    """Folder of ``embedded:NAME`` or of an existing folder; a hub id ``owner/name`` as it is.

    ``field`` names it in messages.

    Raises:
        ConfigError: if it is none of these, or a config file in it cannot be meant.
    """
    if path.startswith(_EMBEDDED):
        known = sorted(_EMBEDDED + p.name for p in _ROOT.glob("*") if p.is_dir())
        if path not in known:
            there = ", ".join(known) or "none"
            raise ConfigError(f"{field}: no embedded checkpoint {path!r}; there are {there}")
        return str(_ROOT / path.removeprefix(_EMBEDDED))
    with one_line(f"{field}: checkpoint {path!r} cannot be opened"):
        folder = Path(path).expanduser()
        if folder.is_dir():
            _check_configs(folder)
            return str(folder)
        if _HUB_ID.fullmatch(path) and not Path(path).parent.exists():
            return path
    if folder.is_file():
        raise ConfigError(
            f"{field}: checkpoint {path!r} is one file, as ComfyUI has it; a folder in the format "
            "of diffusers is needed: `hf download OWNER/NAME --local-dir DIR`, or give OWNER/NAME"
        )
    raise ConfigError(
        f"{field}: checkpoint {path!r} not found; give an existing folder, a hub id 'owner/name' "
        "or 'embedded:NAME'"
    )


def is_embedded(path: str) -> bool:
    """Whether a text names a checkpoint of the package."""
    return path.startswith(_EMBEDDED)


def embedded_file(name: str) -> Path:
    """A file of the package that is no checkpoint."""
    return _ROOT / name


def _check_configs(folder: Path) -> None:
    places = [place for name in _CONFIGS for place in (name, f"*/{name}")]
    for file in (file for place in places for file in folder.glob(place)):
        for key, number in _integers(json.loads(file.read_text(encoding="utf-8"))):
            limit = _MAX_LAYERS if re.search("layers|depth|blocks", key) else _MAX_SIZE
            if abs(number) > limit:
                raise ValueError(f"{file}: {key} must be at most {limit:,}, got {number}")


def _integers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    if type(value) is int:
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _integers(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _integers(item, key)


def is_there(path: str) -> bool:
    """Whether a text names a file, a folder, an embedded checkpoint, or a downloaded hub id."""
    return os.path.exists(_place(path)) or _commit_file(path) is not None


def path_revision(path: str) -> str | None:
    """SHA-256 of the content of a file or folder, or the commit of a hub id; None: not there."""
    place = _place(path)
    if os.path.isfile(place):
        return _digest(Path(place))
    if os.path.isdir(place):
        files = sorted(file for file in Path(place).rglob("*") if file.is_file())
        parts = [[str(file.relative_to(place)), _digest(file)] for file in files]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    head = _commit_file(path)
    return head and f"commit {head.read_text().strip()}"


def _place(path: str) -> str:
    if path.startswith(_EMBEDDED):
        return str(_ROOT / path.removeprefix(_EMBEDDED))
    return os.path.expanduser(path)


def _commit_file(path: str) -> Path | None:
    """The file of the hub's cache that says which commit of a hub id was downloaded last."""
    if not _HUB_ID.fullmatch(path):
        return None
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    head = cache / f"models--{path.replace('/', '--')}" / "refs" / "main"
    return head if os.path.isfile(head) else None


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def one_line(what: str, kind: type[CustomizedGRPOError] = ConfigError) -> Iterator[None]:
    """Turns what loaders raise, which is anything where a file is damaged, into one line.

    Raises:
        CustomizedGRPOError: of ``kind``, opened by ``what``; one of the body's as it is.
    """
    try:
        yield
    except CustomizedGRPOError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        fix = "give another folder or hub id" if kind is ConfigError else "restore or replace it"
        raise kind(f"{what}: {reason[:400]}; {fix}") from error


def check_finite(
    state: Mapping[str, Tensor], what: str, kind: type[CustomizedGRPOError] = ConfigError
) -> None:
    """Raises ``kind``, opened by ``what``, if a tensor is missing or has NaN or infinite values."""
    for name, tensor in state.items():
        if tensor.is_meta:
            raise kind(f"{what}: must hold {name!r}, it is missing; restore it")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise kind(f"{what}: {name!r} must be finite, got NaN or infinity; restore it")
