"""The configs that ship with the package."""

from __future__ import annotations

from pathlib import Path


def shipped_config(name: str) -> Path:
    """Configs lie inside an installed package, and at the top of a source checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs" / name
    return installed if installed.exists() else package.parents[1] / "configs" / name
