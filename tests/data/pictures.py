"""Pictures for the tests of the data sources: made up, and DreamBench's where they lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image

_SHARED = ROOT.parent / "shared" / "dreambench"
DREAMBENCH = Path(os.environ.get("CUSTOMIZED_GRPO_DREAMBENCH", _SHARED)) / "dataset"
on_the_dataset = pytest.mark.skipif(
    not DREAMBENCH.is_dir(),
    reason=f"DreamBench is not at {DREAMBENCH}; set CUSTOMIZED_GRPO_DREAMBENCH to its folder",
)


def paint(path: Path, size: tuple[int, int] = (48, 40), color: object = "red") -> Path:
    """Writes a picture of one colour; size = (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "L" if isinstance(color, int) else "RGB"
    Image.new(mode, size, color).save(path)  # pyright: ignore
    return path
