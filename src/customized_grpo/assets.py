"""Where a checkpoint named in a config lies: embedded in the package, a folder, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from customized_grpo.errors import ConfigError

_EMBEDDED = "embedded:"
_ROOT = Path(__file__).parent / "assets"


def resolve_checkpoint(path: str) -> str:
    """Folder of ``embedded:NAME`` or of an existing folder; a hub id ``owner/name`` as it is.

    Raises:
        ConfigError: if it is none of these.
    """
    if path.startswith(_EMBEDDED):
        folder = _ROOT / path.removeprefix(_EMBEDDED)
        if not folder.is_dir():
            known = ", ".join(sorted(_EMBEDDED + p.name for p in _ROOT.glob("*") if p.is_dir()))
            raise ConfigError(f"path: no embedded checkpoint {path!r}; there are {known or 'none'}")
        return str(folder)
    if Path(path).expanduser().is_dir():
        return str(Path(path).expanduser())
    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", path) and not Path(path).parent.exists():
        return path
    raise ConfigError(
        f"path: checkpoint {path!r} not found; give an existing folder, a hub id 'owner/name' "
        "or 'embedded:NAME'"
    )
