"""`cgrpo doctor`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from customized_grpo.cli.shared import next_step

_COLORS = {"ok": "", "warning": "yellow", "problem": "red"}


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
    )
    target = "YAML file of a run, or folder of one to go on with"
    parser.add_argument("target", metavar="CONFIG|RUN", type=Path, nargs="?", help=target)
    parser.add_argument(
        "--json", action="store_true", help="print a list of {check, status, found, fix}"
    )
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from rich.console import Console
    from rich.text import Text

    from customized_grpo.tools.doctor.examine import examine
    from customized_grpo.tools.doctor.findings import line, summary

    console, findings = Console(soft_wrap=True), []  # paths and flags are to be copied whole
    for finding in examine(options.target, overrides):
        findings.append(finding)
        if not options.json:  # at once: some checks take seconds
            console.print(Text(line(finding), style=_COLORS[finding.status]))
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print(summary(findings))
    is_bad = any(finding.status == "problem" for finding in findings)
    if not (is_bad or options.json) and options.target is not None and options.target.is_file():
        next_step("train", options.target, *overrides, "--rehearse")
    return int(is_bad)
