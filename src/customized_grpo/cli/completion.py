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
    """The script, for a parser of which `train` and `resume` have no arguments yet: theirs are the
    fields of the config, which argparse does not parse."""
    import shtab

    from customized_grpo.config import RunConfig, list_fields

    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name in ("train", "resume"):
        command = commands.choices[name]
        command.add_argument("target", type=Path)
        command.add_argument("--allow-changed", action="store_true")
        for field in list_fields(RunConfig):
            command.add_argument(f"--{field.path}")
    commands.choices["train"].add_argument("--resume", choices=("auto",))
    for command in commands.choices.values():
        for action in command._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
    return shtab.complete(parser, shell)
