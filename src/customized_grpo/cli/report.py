"""`cgrpo report`."""

from __future__ import annotations

import argparse
import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from customized_grpo.errors import ConfigError

logger = logging.getLogger("customized_grpo")


def add(commands: Any) -> None:
    """Adds the parser."""
    parser = commands.add_parser(
        "report",
        help="one HTML page of runs or of a study: tables, curves, pictures",
        description="Write one self-contained HTML page, and its figures as PNG, of evaluated runs "
        "(cgrpo evaluate) or of the results of a study (cgrpo compare). Runs that differ in their "
        "seed only count as one method.",
        epilog="examples:\n  cgrpo report runs/emoji\n"
        "  cgrpo report runs/mine runs/other --out both\n"
        "  cgrpo report docs/results/leaderboard --against awm --out against-awm",
    )
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="folder of a run, or one of a study"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="where to write (default: the first RUN)"
    )
    parser.add_argument(
        "--against",
        metavar="METHOD",
        help="compare the others with this method of the study, or RUN (default: the study's main "
        "method, or the first RUN)",
    )
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    logger.info("reading the results and drawing figures")

    from customized_grpo.evaluation.report.page import run_pictures, study_pictures, write_report
    from customized_grpo.evaluation.results import Results
    from customized_grpo.evaluation.study import RESULTS, results_of_runs

    runs: list[Path] = options.runs
    folder = options.out or runs[0]
    if len(runs) == 1 and (runs[0] / RESULTS).exists():
        results = Results.read(runs[0] / RESULTS)
        pictures = study_pictures(results, runs[0])
    else:
        results = results_of_runs(runs)
        pictures = run_pictures(results, runs)
    flags = ["--out", str(options.out)] if options.out else []
    if options.against is not None:
        if options.against not in results.methods:
            known = ", ".join(results.methods)
            raise ConfigError(f"--against must be of {known}, got {options.against!r}")
        results = replace(results, main=options.against)
        flags += ["--against", options.against]
    command = shlex.join(["cgrpo", "report", *map(str, runs), *flags])
    print(f"report: {write_report(results, folder, command, pictures)}")
