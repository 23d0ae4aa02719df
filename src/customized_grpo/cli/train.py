"""`cgrpo train` and `cgrpo resume`, whose flags are the fields of the config."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customized_grpo.cli.fields import field_lines
from customized_grpo.cli.shared import after_training, free_path, hide_loading_bars, next_step
from customized_grpo.errors import ConfigError
from customized_grpo.inputs import read_number
from customized_grpo.runs.files import MetricsReader, why_stopped
from customized_grpo.runs.works import does_it_work

if TYPE_CHECKING:
    from customized_grpo.config import RunConfig

_RESUME_HELP = """\
usage: cgrpo resume RUN [--allow-changed] [--section.field value ...]

Go on with a run that was stopped, from its newest checkpoint that is whole. On the same CPU (and
GPU, with --deterministic true) what it computes is what it would have computed without the break.
Fields may be overridden: freely those that decide
where and how long a run goes (--train.num_updates 400, --device cpu), others with --allow-changed,
never those that what was trained depends on (generator, lora, ...).

examples:
  cgrpo resume runs/emoji
  cgrpo resume runs/emoji --train.num_updates 400   make a finished run longer
  cgrpo train configs/emoji.yaml --resume auto      begin, or go on: for job scripts
  (which takes --allow-changed too)"""


def add(commands: Any) -> None:
    """Adds the two names, without arguments: theirs are the fields of the config."""
    commands.add_parser("train", help="train a generator as a config says")
    commands.add_parser("resume", help="go on with a run that was stopped")


def run_train(arguments: Sequence[str]) -> None:
    """`cgrpo train CONFIG [--section.field value ...]`."""
    config, *overrides = arguments or [""]
    is_flag = config.startswith("-")
    if {"-h", "--help"} & set(arguments):
        print(_train_help(None if is_flag else config))
        return
    if not config or is_flag:
        raise ConfigError(
            f"CONFIG must come first, got {config or 'nothing'}; write `cgrpo train CONFIG "
            "[--section.field value ...]`, for example `cgrpo train configs/emoji.yaml`"
        )
    allow_changed, overrides = _take_flag("--allow-changed", overrides)
    resume, overrides = _take_resume(overrides)
    rehearsed, overrides = _take_flag("--rehearse", overrides)
    if rehearsed and resume:
        raise ConfigError("--rehearse must be left out with --resume auto, it keeps nothing")
    if rehearsed:
        _rehearse(config, overrides)
        return
    if allow_changed and not resume:
        raise ConfigError("--allow-changed has no effect without --resume auto; leave it out")
    train_config(config, overrides, resume=resume, allow_changed=allow_changed)


def _take_flag(name: str, flags: Sequence[str]) -> tuple[bool, list[str]]:
    return name in flags, [flag for flag in flags if flag != name]


def _take_value(name: str, flags: Sequence[str]) -> tuple[str | None, list[str]]:
    """A flag that is no field of the config; '' where its value is missing, None without it."""
    prefix = f"{name}="
    words = [w for f in flags for w in (f.split("=", 1) if f.startswith(prefix) else [f])]
    if name not in words:
        return None, words
    place = words.index(name)
    return "".join(words[place + 1 : place + 2]), words[:place] + words[place + 2 :]


def _take_resume(flags: Sequence[str]) -> tuple[bool, list[str]]:
    value, rest = _take_value("--resume", flags)
    if value not in (None, "auto"):
        raise ConfigError(
            f"--resume must be auto, got {value or 'nothing'!r}; it goes on with the run of that "
            "name, or begins it. To go on with a folder: `cgrpo resume RUN`"
        )
    return value is not None, rest


def _take_price(flags: Sequence[str]) -> tuple[float | None, list[str]]:
    value, rest = _take_value("--price", flags)
    if value is None:
        return None, rest
    with suppress(ValueError):
        if 0 < float(value) < math.inf:
            return float(value), rest
    raise ConfigError(
        f"--price must be of one device for one hour, a number above 0, got {value!r}; write 2.5"
    )


def _rehearse(config_path: str, flags: Sequence[str]) -> None:
    price, overrides = _take_price(flags)
    from customized_grpo.config import load_config

    config = load_config(config_path, overrides)

    from customized_grpo.tools.rehearse import rehearse

    hide_loading_bars()
    for line in rehearse(config, price, free_path(Path(f"{config.name}-rehearsal.png"))):
        print(line)


def train_config(
    config_path: str | Path,
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


def run_resume(arguments: Sequence[str]) -> None:
    """`cgrpo resume RUN [--allow-changed] [--section.field value ...]`."""
    run, *flags = arguments or [""]
    if {"-h", "--help"} & set(arguments):
        print(_RESUME_HELP)
        return
    if not run or run.startswith("-"):
        raise ConfigError(
            f"RUN must come first, got {run or 'nothing'}; write `cgrpo resume RUN`, for example "
            "`cgrpo resume runs/emoji`"
        )
    from customized_grpo.runs.run import Run

    allow_changed, overrides = _take_flag("--allow-changed", flags)
    config = Run.open(Path(run), overrides).config

    from customized_grpo.training.train import train

    hide_loading_bars()
    _print_run(config, train(config, resume=True, allow_changed=allow_changed))


def _train_help(config_path: str | None) -> str:
    """All fields with their docs: of a config file with its values, or with the defaults."""
    from customized_grpo.config import RunConfig, load_config

    lines = [
        "usage: cgrpo train CONFIG [--rehearse [--price P]] [--resume auto] "
        "[--section.field value ...]",
        "",
        "Train a generator as a YAML file says; flags override its fields. A whole section is",
        "replaced by YAML: --lora null, --advantage.schedule '{type: constant, prompt: 0.6}'.",
        "--rehearse makes two rollouts and their updates on this device and says what the whole",
        "run would take: memory, hours, the cost at P for a device and hour. It keeps one picture.",
        "",
        "example:",
        "  cgrpo train configs/emoji.yaml --name mine --rollout.group_size 8",
        "  cgrpo train configs/flux-kontext.yaml --rehearse --price 2.5",
        "",
        f"fields, with the values of {config_path}:"
        if config_path
        else "fields, with their defaults (`cgrpo train CONFIG --help`: also the plugs' fields):",
    ]
    return "\n".join([*lines, *field_lines(load_config(config_path) if config_path else RunConfig)])
