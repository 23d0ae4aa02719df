"""`cgrpo data`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from customized_grpo.cli.shared import free_path, next_step


def add(commands: Any) -> None:
    """Adds the parser."""
    parser = commands.add_parser(
        "data",
        help="check the data of a config and show the first training batch",
        description="Check the data of a config, count them, and draw the first training batch.",
        epilog="example:\n  cgrpo data configs/emoji.yaml --out batch.png",
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of a run")
    parser.add_argument(
        "--out", metavar="PNG", type=Path, help="default: data.png, numbered if there is one"
    )
    parser.set_defaults(run=_data)


def _data(options: argparse.Namespace) -> None:
    from customized_grpo.config import load_config
    from customized_grpo.data.overview import show_data

    out = options.out or free_path(Path("data.png"))
    print(show_data(load_config(options.config), out))
    print(f"picture: {out}")
    next_step("train", options.config)
