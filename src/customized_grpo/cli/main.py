"""The command `cgrpo`; its subcommands are the other modules here."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from customized_grpo.cli import (
    compare,
    completion,
    data,
    demo,
    doctor,
    estimate,
    evaluate,
    export,
    generate,
    init,
    playground,
    replay,
    report,
    serve_reward,
    train,
    vote,
    watch,
)
from customized_grpo.errors import ConfigError, CustomizedGRPOError, Interrupted

_ABOUT = """\
Customized-GRPO: reinforcement learning for subject-driven image generation.
Teaches a generator to keep the subject of a reference picture and to do what the prompt says.
"""

_EXAMPLES = """\
examples:
  cgrpo demo                                              teach the embedded generator on a CPU
  cgrpo train configs/emoji.yaml --train.num_updates 100  train; any field can be overridden
  cgrpo init my-dog --photos photos --class dog           your own photos: prompts and a config
  cgrpo evaluate runs/emoji                               base against tuned, held-out subjects
  cgrpo generate runs/emoji --file prompts.jsonl          your own prompts, base beside tuned
  cgrpo export runs/emoji --to hub-folder --out my-lora   a LoRA with its model card
  cgrpo estimate configs/flux-kontext.yaml --num-devices 8  seconds, memory and cost of a run
  cgrpo doctor configs/flux-kontext.yaml                  is everything there that a run needs?
"""

_EXIT_CODES = """\

exit codes:
  0        done
  1        a defect, with its traceback; of `cgrpo doctor`: it has found a problem
  2        an error that you can mend, in one line
  130      stopped by Ctrl-C
  128 + N  stopped by signal N, for example 143 by SIGTERM; a run has made a checkpoint
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `cgrpo`; returns the exit code, as `_EXIT_CODES` has it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        try:
            return _run(arguments)
        finally:
            if output := sys.stdout:  # None: it was closed by whoever started this
                output.flush()  # here, where a reader that is gone can be told from a defect
    except SystemExit as stop:  # after help or version
        return int(stop.code or 0)
    except Interrupted as interrupted:
        print(f"cgrpo: {_one_line(interrupted)}", file=sys.stderr)
        return 128 + interrupted.received
    except BrokenPipeError:  # `| head` has read enough; nothing is left to flush at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (CustomizedGRPOError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"cgrpo: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cgrpo: interrupted", file=sys.stderr)
        return 130


def _run(arguments: Sequence[str]) -> int:
    _set_up_output()
    # Plugs by import path may lie beside the config, as modules do for `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    options, overrides = _parse(arguments or ["--help"])
    return options.run(options, *overrides) or 0


def _set_up_output() -> None:
    """Shows this package's log lines; of the libraries', errors only, unless the user asks."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold what it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("customized_grpo").setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if "TORCH_LOGS" not in os.environ:  # at their import: kernels of other hardware, deprecations
        for name in ("torch.utils._pytree", "torchao", "bitsandbytes"):
            logging.getLogger(name).setLevel(logging.ERROR)
    # Pillow warns of what data/images.py refuses with an error.
    warnings.filterwarnings("ignore", message=".*could be decompression bomb")
    # torch says once that bfloat16 autocast cannot fuse an RMSNorm with float32 weights.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    # FSDP warns on every rank of blocks that return a view, as FLUX's: nobody changes it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


class _Parser(argparse.ArgumentParser):
    """The parser of the command, and of each subcommand."""

    def __init__(self, **options: Any) -> None:
        keep_lines: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(allow_abbrev=False, **(keep_lines | options))

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cgrpo",
        description=_ABOUT,
        epilog=_EXAMPLES + _EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("--debug", action="store_true", help="print a traceback with an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    parts = (
        *(init, train, watch, vote, evaluate, generate, playground, export, report),
        *(data, doctor, estimate, compare, demo, replay, serve_reward),
    )
    for part in parts:
        part.add(commands)
    completion.add(commands, parser)
    show_version = commands.add_parser(
        "version",
        help="print the version",
        epilog="example:\n  cgrpo version",
    )
    show_version.set_defaults(run=lambda options: print(_version()))
    return parser


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[list[str]]]:
    """Options, and what is left of the arguments for commands that override a config's fields."""
    parser, command = _parser(), arguments[0] if arguments else ""
    if command not in ("train", "resume", "doctor", "estimate", "evaluate"):
        return parser.parse_args(arguments), []
    options, overrides = parser.parse_known_args(arguments)
    flag = next((word for word in overrides if word.startswith("-")), None)
    # The value of an unknown flag before it would be taken for the config.
    if flag and options.target not in map(Path, arguments[1 : arguments.index(flag)]):
        target = "RUN" if command == "resume" else "CONFIG"
        raise ConfigError(
            f"{target} must come first, got {flag}; write `cgrpo {command} {target} "
            f"[--section.field value ...]`, see `cgrpo {command} --help`"
        )
    return options, [overrides]


def _version() -> str:
    return f"customized-grpo {version('customized-grpo')}"
