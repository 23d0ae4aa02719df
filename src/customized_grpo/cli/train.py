"""`cgrpo train` and `cgrpo resume`, whose flags are the fields of the config too."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customized_grpo.cli.fields import FieldsHelp
from customized_grpo.cli.shared import (
    after_training,
    free_path,
    hide_loading_bars,
    next_step,
    number,
    refuse,
)
from customized_grpo.files import read_number
from customized_grpo.runs.files import MetricsReader, why_stopped
from customized_grpo.runs.works import does_it_work

if TYPE_CHECKING:
    from customized_grpo.config import RunConfig


def add(commands: Any) -> None:
    """Adds the parsers of both."""
    parser = commands.add_parser(
        "train",
        add_help=False,
        help="train a generator as a config says",
        usage="cgrpo train CONFIG [--rehearse [--price P]] [--resume auto] "
        "[--section.field value ...]",
        description="Train a generator as a YAML file says; flags override its fields. A whole "
        "section is\nreplaced by YAML: --lora null, --advantage.schedule '{type: constant, prompt: "
        "0.6}'.",
        epilog="examples:\n  cgrpo train configs/emoji.yaml --name mine --rollout.group_size 8\n"
        "  cgrpo train configs/flux-kontext.yaml --rehearse --price 2.5",
    )
    parser.add_argument("-h", "--help", action=FieldsHelp, config_of=_fields_of)
    parser.add_argument("target", metavar="CONFIG", type=Path, help="YAML file of a run")
    rehearse = (
        "make two rollouts and their updates on this device and say what the whole run would "
    )
    rehearse += "take: memory, hours, cost; keeps one picture"
    parser.add_argument("--rehearse", action="store_true", help=rehearse)
    price = number(0, sys.float_info.max, "of one device for one hour, a number above 0")
    parser.add_argument("--price", type=price, metavar="P", help="of a device for an hour")
    auto = "begin, or go on with the run of that name: for job scripts"
    parser.add_argument("--resume", choices=("auto",), help=auto)
    changed = "go on although it is another run from here on"
    parser.add_argument("--allow-changed", action="store_true", help=changed)
    parser.set_defaults(run=_run_train)

    parser = commands.add_parser(
        "resume",
        help="go on with a run that was stopped",
        usage="cgrpo resume RUN [--allow-changed] [--section.field value ...]",
        description="Go on with a run that was stopped, from its newest checkpoint that is whole. "
        "On the same\nCPU (and GPU, with --deterministic true) what it computes is what it would "
        "have computed\nwithout the break. Fields may be overridden: freely those that decide "
        "where and how long a\nrun goes (--train.num_updates 400, --device cpu), others with "
        "--allow-changed, never those\nthat what was trained depends on (generator, lora, ...).",
        epilog="examples:\n  cgrpo resume runs/emoji\n"
        "  cgrpo resume runs/emoji --train.num_updates 400   make a finished run longer\n"
        "  cgrpo train configs/emoji.yaml --resume auto      begin, or go on: for job scripts",
    )
    parser.add_argument("target", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument("--allow-changed", action="store_true", help=changed)
    parser.set_defaults(run=_run_resume)


def _fields_of(target: Path | None) -> Any:
    from customized_grpo.config import RunConfig, load_config

    return RunConfig if target is None else load_config(target)


def _run_train(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    if options.rehearse:
        refuse(options, ("resume", "allow_changed"), "with --rehearse, which keeps nothing")
        _rehearse(options.target, overrides, options.price)
        return
    refuse(options, ("price",), "without --rehearse; leave it out")
    resume = options.resume is not None
    if not resume:
        refuse(options, ("allow_changed",), "without --resume auto; leave it out")
    train_config(options.target, overrides, resume=resume, allow_changed=options.allow_changed)


def _rehearse(config_path: Path, overrides: Sequence[str], price: float | None) -> None:
    from customized_grpo.config import load_config

    config = load_config(config_path, overrides)

    from customized_grpo.tools.rehearse import rehearse

    hide_loading_bars()
    lines = rehearse(config, price, free_path(Path(f"{config.name}-rehearsal.png")))
    for line in lines:
        print(line)
    if lines:  # the first of several processes
        next_step("train", config_path, *overrides)


def train_config(
    config_path: Path,
    overrides: Sequence[str],
    *,
    resume: bool = False,
    allow_changed: bool = False,
    lead_on: bool = True,
) -> Path:
    """Trains; ``lead_on``: shows the command that comes next."""
    from customized_grpo.config import load_config

    config = load_config(config_path, overrides)

    from customized_grpo.training.train import train

    hide_loading_bars()
    run = train(config, resume=resume, allow_changed=allow_changed)
    _print_run(config, run, lead_on=lead_on)
    return run


def _print_run(config: RunConfig, run: Path, *, lead_on: bool = True) -> None:
    if read_number("RANK", 0) == 0:  # of several processes that torchrun has started
        print(f"run: {run}")
        _print_whether_it_works(run)
        if lead_on:
            next_step(*after_training(config, run))


def _print_whether_it_works(run: Path) -> None:
    """By the last validation of a run; on stderr, so that scripts read results only."""
    reader = MetricsReader(run)
    reader.read()
    is_cut = why_stopped(run)  # by the alarm, with weights of an earlier update
    if reader.rows and not is_cut and (text := does_it_work(reader.rows[-1])):
        print(text, file=sys.stderr)


def _run_resume(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from customized_grpo.runs.run import Run

    config = Run.open(options.target, overrides).config

    from customized_grpo.training.train import train

    hide_loading_bars()
    _print_run(config, train(config, resume=True, allow_changed=options.allow_changed))
