"""`cgrpo vote`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from customized_grpo.cli.shared import positive
from customized_grpo.errors import ConfigError, needs_extra
from customized_grpo.runs.interrupts import Interrupts


def add(commands: Any) -> None:
    """Adds the parser."""
    parser = commands.add_parser(
        "vote",
        help="a page on this machine: choose between the pictures that a run waits for",
        description="Serve a page on this machine on which people choose the best picture of every "
        "group that a run with a reward of type `votes` waits for, by click or by key. Ctrl-C ends "
        "it; the run goes on waiting. Needs the extra `playground`.",
        epilog="examples:\n  cgrpo vote runs/mine\nhow a run is trained on votes: docs/rewards.md",
    )
    folder = "folder of a run with a reward of type votes"
    parser.add_argument("run_folder", metavar="RUN", type=Path, help=folder)
    port = "of 127.0.0.1 (default: the first free one from 7870)"
    parser.add_argument("--port", type=positive, metavar="N", help=port)
    parser.set_defaults(run=_vote)


def _vote(options: argparse.Namespace) -> None:
    with needs_extra("playground", "vote"):
        from customized_grpo.tools.vote.booth import Booth, serving
    from customized_grpo.rewards.votes import VotesConfig
    from customized_grpo.runs.run import Run

    run = options.run_folder.resolve()
    rewards = Run.open(run).config.rewards
    folders = {reward.place(run) for reward in rewards if isinstance(reward, VotesConfig)}
    if not folders:
        names = ", ".join(reward.label for reward in rewards)
        raise ConfigError(
            f"RUN must have a reward of type votes, got {run} with {names}; only such a run asks"
        )
    booth = Booth(sorted(folders))
    with Interrupts() as interrupts, serving(booth, run.name, options.port) as address:
        print(f"vote: {address}\nCtrl-C ends it", flush=True)
        while interrupts.received is None:
            interrupts.sleep(60)
