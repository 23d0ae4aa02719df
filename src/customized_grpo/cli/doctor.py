"""`cgrpo doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Adds the parser."""
    parser = commands.add_parser(
        "doctor",
        help="what is wrong with this machine or a planned run, and the fix",
        description="Look at this machine and, with a CONFIG or a RUN to go on with, at everything "
        "the run needs: packages, devices, disks, weights, endpoints, data, memory, folders. "
        "Nothing is trained, no weights are loaded or downloaded. Without: which of the packaged "
        "configs fit into the memory here. CONFIG's fields can be overridden as for `cgrpo train`.",
        epilog="examples:\n  cgrpo doctor\n"
        "  cgrpo doctor configs/flux-kontext.yaml\n"
        "  cgrpo doctor configs/flux-kontext.yaml --generator.offload true --json\n"
        "  cgrpo doctor runs/emoji && cgrpo resume runs/emoji\n"
        "exit code: 0 = no problem (warnings may be there), 1 = a problem, 2 = wrong usage",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    target = "YAML file of a run, or folder of one to go on with"
    parser.add_argument("target", metavar="CONFIG|RUN", type=Path, nargs="?", help=target)
    parser.add_argument(
        "--json", action="store_true", help="print a list of {check, status, found, fix}"
    )
    parser.set_defaults(run=_doctor)


@contextmanager
def _doing() -> Iterator[Callable[[str], None]]:
    """Shows on a terminal what is looked at, which may take seconds."""
    if not sys.stderr.isatty():
        yield lambda doing: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield lambda doing: status.update(f"looking at {doing}")


def _doctor(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from rich.console import Console

    from customized_grpo.tools.doctor.examine import examine
    from customized_grpo.tools.doctor.table import as_json, line, summary, table

    console, findings = Console(), []
    is_plain = not (options.json or console.is_terminal)
    with _doing() as say:
        for finding in examine(options.target, overrides, say):
            findings.append(finding)
            if is_plain:
                print(line(finding), flush=True)
    if options.json:
        print(as_json(findings))
    else:
        if not is_plain:
            console.print(table(findings))
        print(summary(findings))
    return int(any(finding.status == "problem" for finding in findings))
