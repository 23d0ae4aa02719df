"""`cgrpo completion`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any, whole: argparse.ArgumentParser) -> None:
    """Adds the parser; what is completed are the commands of ``whole``."""
    parser = commands.add_parser(
        "completion",
        help="a script by which your shell completes commands, fields and files",
        description="Print a script that completes cgrpo's commands, options, the fields of a "
        "config and files in your shell.",
        epilog='examples:\n  eval "$(cgrpo completion bash)"             in this shell\n'
        "  cgrpo completion bash > ~/.local/share/bash-completion/completions/cgrpo\n"
        "  cgrpo completion zsh > ~/.zfunc/_cgrpo       in a folder of $fpath",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="of your terminal")
    parser.set_defaults(run=lambda options: print(script(whole, options.shell)))


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script; with the fields of `train` and `resume`, which argparse leaves to the config."""
    import shtab

    from customized_grpo.config import RunConfig, list_fields

    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name in ("train", "resume"):
        for field in list_fields(RunConfig):
            commands.choices[name].add_argument(f"--{field.path}")
    for command in commands.choices.values():
        for action in command._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
    return shtab.complete(parser, shell)
