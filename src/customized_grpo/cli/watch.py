"""`cgrpo watch`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customized_grpo.cli.shared import number, refuse
from customized_grpo.runs.interrupts import Interrupts

if TYPE_CHECKING:
    from rich.console import Console

    from customized_grpo.tools.watch.facts import Facts, Watcher


def add(commands: Any) -> None:
    """Adds the parser."""
    parser = commands.add_parser(
        "watch",
        help="how far, how fast and how well a run is going, live, from its folder alone",
        description="Show a run as it goes on: progress, speed, rewards, conflicts, validation "
        "scores, and its state. It reads the run's folder and nothing else, so it works "
        "from any machine that sees the folder. Ctrl-C leaves; the run does not notice. Without a "
        "terminal it prints one frame.",
        epilog="examples:\n  cgrpo watch runs/emoji\n"
        "  ssh cluster cgrpo watch /runs/emoji --once\n"
        "  cgrpo watch runs/emoji --json | jq .state\n"
        "what is shown, and what the states mean: docs/watching.md",
    )
    folder = "folder of a run, which need not have begun"
    parser.add_argument("run_folder", metavar="RUN", type=Path, help=folder)
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument("--json", action="store_true", help="print one JSON object and end")
    interval = "seconds between two looks (default: 2)"
    seconds = number(0.1, 3600, "seconds from 0.1 to 3600")
    parser.add_argument("--interval", type=seconds, metavar="S", help=interval)
    parser.set_defaults(run=_watch)


def _watch(options: argparse.Namespace) -> None:
    from rich.console import Console

    from customized_grpo.tools.watch.facts import Watcher
    from customized_grpo.tools.watch.view import frame

    if options.once or options.json:
        flag = "once" if options.once else "json"
        refuse(options, ("interval",), f"with --{flag}; leave it out")
    watcher, console = Watcher(options.run_folder), Console(highlight=False)
    if options.json:
        from pydantic_core import to_json

        print(to_json(watcher.look(), inf_nan_mode="null").decode())
    elif options.once or not (sys.stdout and sys.stdout.isatty()) or console.is_dumb_terminal:
        console.print(frame(watcher.look(), console.width))
    else:
        console.print(frame(_follow(watcher, console, options.interval or 2.0), console.width))


def _follow(watcher: Watcher, console: Console, interval: float) -> Facts:
    """Until the run is finished or the user leaves; the last facts that were seen."""
    from rich.live import Live

    from customized_grpo.tools.watch.view import frame

    facts = watcher.look()
    # A noted signal, for Python drops a KeyboardInterrupt that comes within a weakref's callback.
    with (
        Interrupts() as interrupts,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while facts.state != "finished" and interrupts.received is None:
            live.update(frame(facts, console.width), refresh=True)
            interrupts.sleep(interval)
            facts = watcher.look()
    return facts
