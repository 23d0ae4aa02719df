"""What several test modules share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from customized_grpo.config import RunConfig

ROOT = Path(__file__).parents[1]


def changed(config: RunConfig, **sections: dict[str, object]) -> RunConfig:
    """The config with some fields of some sections replaced."""
    replaced = {
        name: dataclasses.replace(getattr(config, name), **fields)
        for name, fields in sections.items()
    }
    return dataclasses.replace(config, **replaced)
