"""The configs that ship with the package."""

from __future__ import annotations

import os
from pathlib import Path


def shipped_config(name: str) -> Path:
    """Configs lie inside an installed package, and at the top of a source checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs" / name
    return installed if os.path.exists(installed) else package.parents[1] / "configs" / name
