"""What several commands need."""

from __future__ import annotations

import argparse
import sys


def hide_loading_bars() -> None:
    """The libraries draw a bar per checkpoint part, worth seeing on a terminal only."""
    if not sys.stderr.isatty():
        import diffusers
        import transformers

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def positive(text: str) -> int:
    """A type of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)
