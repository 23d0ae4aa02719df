"""What several commands need."""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customized_grpo.errors import ConfigError
from customized_grpo.files import read_number

if TYPE_CHECKING:
    from customized_grpo.config import RunConfig


def hide_loading_bars() -> None:
    """The libraries draw a bar per checkpoint part, worth seeing on a terminal only."""
    if not sys.stderr.isatty():
        for library in ("diffusers", "transformers"):
            with suppress(ModuleNotFoundError):  # the server of a reward may have neither
                import_module(f"{library}.utils.logging").disable_progress_bar()


def alone(command: str) -> None:
    """Refuses several processes, which would compute the same and write the same files.

    Raises:
        ConfigError: under a launcher of more than one.
    """
    count = read_number("WORLD_SIZE", 1)
    if count != 1:
        raise ConfigError(
            f"WORLD_SIZE must be 1 for {command}, which one process does, got {count}; call it "
            "without torchrun, or with WORLD_SIZE=1 before it"
        )


def refuse(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raises a ConfigError for the first of some options that is given and has no effect."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value is not False:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect {why}")


def positive(text: str) -> int:
    """A type of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """A type of an argument."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^32 - 1, got {text!r}")
    return int(text)


def pixels(text: str) -> tuple[int, int]:
    """A type of an argument: height and width of WIDTHxHEIGHT."""
    width, _, height = text.lower().partition("x")
    if not all(side.isdecimal() and 0 < int(side) <= 16_384 for side in (width, height)):
        raise argparse.ArgumentTypeError(
            f"must be WIDTHxHEIGHT in pixels, such as 1024x768, got {text!r}"
        )
    return int(height), int(width)


def number(lowest: float, highest: float, words: str) -> Callable[[str], float]:
    """A type of an argument, above 0."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            value = float(text)
            if value > 0 and lowest <= value <= highest:
                return value
        raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}")

    return parse


def free_path(path: Path) -> Path:
    """The path, numbered if there is one already; a file keeps its suffix."""
    suffix = path.suffix if path.is_file() else ""  # a folder's name may have a dot in it
    stem = path.name.removesuffix(suffix)
    numbered = (path.with_name(f"{stem}-{i}{suffix}") for i in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def next_step(*words: object) -> None:
    """Shows the command that comes next."""
    hint(shlex.join(["cgrpo", *map(str, words)]))


def hint(text: str) -> None:
    """Leads a newcomer on; on stderr, so that scripts read results only."""
    print(f"next: {text}", file=sys.stderr)


def after_training(config: RunConfig, run: Path) -> tuple[object, ...]:
    """Pictures of the first held-out prompt where it is about one's own photos, else numbers."""
    from customized_grpo.data.folder import FolderConfig
    from customized_grpo.data.jsonl import JsonlConfig
    from customized_grpo.errors import CustomizedGRPOError
    from customized_grpo.tools.init.guide import flag

    if isinstance(config.data, JsonlConfig | FolderConfig):
        try:
            entry = config.data.build(config.seed).splits.held_out[0]
        except CustomizedGRPOError:  # the data are gone, and the run is finished all the same
            return after_pictures(config, run)
        pictures: Any = entry.references
        references = [word for picture in pictures for word in ("--reference", picture.path)]
        return "generate", run, *flag("--prompt", entry.prompt), *references, "--count", 4
    return after_pictures(config, run)


def after_pictures(config: RunConfig, run: Path) -> tuple[object, ...]:
    """Numbers, where there is something to judge by and these weights have not been judged."""
    from customized_grpo.errors import CustomizedGRPOError
    from customized_grpo.evaluation.evaluate import current_outcome
    from customized_grpo.runs.run import Run

    if config.evaluators:
        try:
            current_outcome(Run.open(run))
        except CustomizedGRPOError:
            return "evaluate", run
    return export_words(run)


def export_words(run: Path) -> tuple[object, ...]:
    """The command that makes a LoRA of a run for others."""
    return "export", run, "--to", "hub-folder", "--out", free_path(Path(f"{run.name}-lora"))
