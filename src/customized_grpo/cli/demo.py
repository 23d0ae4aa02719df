"""`cgrpo demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from customized_grpo.cli.shared import alone, free_path, next_step
from customized_grpo.cli.train import train_config


def add(commands: Any) -> None:
    """Adds the parser."""
    parser = commands.add_parser(
        "demo",
        help="teach the embedded generator on this machine, then evaluate it",
        description="Train configs/emoji.yaml on this machine, then count in how many pictures of "
        "held-out subjects everything that was asked for is there, and the subject is right.",
        epilog="example:\n  cgrpo demo --updates 20 --seed 1\n"
        "for any other field of the config: cgrpo train configs/emoji.yaml --section.field value",
    )
    parser.add_argument("--updates", type=int, help="optimizer steps, an even number (default: 80)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (default: 0)")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    alone("`cgrpo demo`")
    from customized_grpo.config.shipped import shipped_config

    name = free_path(Path("runs", f"demo-seed{options.seed}")).name  # a demo can be repeated
    overrides = ["--name", name, "--seed", str(options.seed)]
    if options.updates is not None:
        overrides += ["--train.num_updates", str(options.updates)]
    run = train_config(shipped_config("emoji.yaml"), overrides, lead_on=False)

    from customized_grpo.evaluation.evaluate import evaluate_run
    from customized_grpo.evaluation.hero import save_hero
    from customized_grpo.evaluation.tables import share_table, verdict

    outcome = evaluate_run(run)
    picture = run / "demo.png"
    save_hero(picture, run, "Customized-GRPO")
    print(f"picture: {picture} (naive GRPO 1:1 is of the proof)")
    print(share_table(outcome))
    print(verdict(outcome))
    next_step("evaluate", run)
