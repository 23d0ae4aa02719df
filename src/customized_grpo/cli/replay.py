"""`cgrpo replay`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from customized_grpo.cli.shared import hide_loading_bars


def add(commands: Any) -> None:
    """Adds the parser."""
    parser = commands.add_parser(
        "replay",
        help="compute an update once more that had a gradient which is not finite",
        description="Compute an update once more from what a run has dumped, and say which "
        "weights, gradients, inputs and (sample, step) pairs are not finite.",
        epilog="example:\n  cgrpo replay runs/emoji/failures/000012",
    )
    parser.add_argument("dump", metavar="DUMP", type=Path, help="folder under RUN/failures")
    parser.set_defaults(run=_replay)


def _replay(options: argparse.Namespace) -> None:
    from customized_grpo.training.nonfinite import replay

    hide_loading_bars()
    print(replay(options.dump))
