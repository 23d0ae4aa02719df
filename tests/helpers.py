"""What several test modules share."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from customized_grpo.config import RunConfig

ROOT = Path(__file__).parents[1]


def changed(config: RunConfig, **sections: dict[str, object]) -> RunConfig:
    """The config with some fields of some sections replaced."""
    replaced = {
        name: dataclasses.replace(getattr(config, name), **fields)
        for name, fields in sections.items()
    }
    return dataclasses.replace(config, **replaced)


def import_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules called ``my_...`` come from a folder, whatever another test has imported."""
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.startswith("my_")]:
        monkeypatch.delitem(sys.modules, name)
