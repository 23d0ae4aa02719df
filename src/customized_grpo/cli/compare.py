"""`cgrpo compare`."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

from customized_grpo.cli.shared import alone, hide_loading_bars, positive, refuse
from customized_grpo.files import write_atomic


def add(commands: Any) -> None:
    """Adds the parser."""
    parser = commands.add_parser(
        "compare",
        help="run a study: methods x seeds, and put the results together",
        description="Run what is missing of a study (methods x seeds, from one YAML file), then "
        "write tables, figures and a report of it. Finished runs are never run twice: interrupt it "
        "and call it again.",
        epilog="examples:\n  cgrpo compare configs/studies/proof.yaml --jobs 2\n"
        "  cgrpo compare configs/studies/proof.yaml --seeds 1 --methods naive-1to1 naive-1to1.5 "
        "customized\n"
        "  cgrpo compare configs/studies/proof.yaml --results docs/results   from what is kept\n"
        "  cgrpo compare configs/studies/leaderboard.yaml --add mine='{advantage.gamma: 0.2}'",
    )
    parser.add_argument("study", metavar="STUDY", type=Path, help="YAML file of a study")
    parser.add_argument(
        "--jobs",
        type=positive,
        metavar="N",
        help="runs at a time, each with its share of the cores (default: one per core, on a GPU 1)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="folder of results.json, tables, figures and report (default: the study's folder)",
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="run these only (default: all)"
    )
    parser.add_argument(
        "--seeds", type=positive, metavar="N", help="run the first N seeds only (default: all)"
    )
    parser.add_argument(
        "--cell",
        metavar="METHOD/seedN",
        help="run this one only, in this process: for clusters, an array job over the cells",
    )
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="NAME=OVERRIDES",
        help="one more method: {FIELD: VALUE, ...} as in the study's overrides, or a YAML file of "
        "them; repeatable. Once it has run its results stay, also in calls without it",
    )
    parser.add_argument(
        "--leaderboard",
        type=Path,
        metavar="FILE",
        help="also write the ranking by pictures right in both, as a Markdown page",
    )
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> None:
    alone("`cgrpo compare`")
    from customized_grpo.evaluation.study import Study, compare, run_task

    study = Study.load(options.study, options.results, options.add)
    hide_loading_bars()
    if options.cell is not None:
        names = ("jobs", "methods", "seeds", "leaderboard")
        refuse(options, names, "on a single --cell; leave it out")
        run_task(study, study.task(options.cell))
        return

    import torch

    from customized_grpo.devices import process_cores
    from customized_grpo.evaluation.report.leaderboard import leaderboard
    from customized_grpo.evaluation.report.page import check_extra, study_pictures, write_report
    from customized_grpo.evaluation.report.tables import markdown

    check_extra()
    jobs = options.jobs or (1 if torch.cuda.is_available() else process_cores())
    results = compare(study, jobs, options.methods or (), options.seeds)
    flags = ["--results", str(options.results)] if options.results else []
    flags += [word for text in options.add for word in ("--add", text)]
    if options.leaderboard:
        flags += ["--leaderboard", str(options.leaderboard)]
    command = shlex.join(["cgrpo", "compare", str(options.study), *flags])
    page = write_report(results, study.results, command, study_pictures(results, study.results))
    print(markdown(results))
    print(f"report: {page}")
    if options.leaderboard:
        folder = options.leaderboard.parent
        folder.mkdir(parents=True, exist_ok=True)
        figure = page.parent / "figures" / "right-ranking.png"
        link = Path(os.path.relpath(figure, folder)).as_posix() if figure.exists() else ""
        text = leaderboard(results, command, link, study.config.about)
        write_atomic(options.leaderboard, text)
        print(f"leaderboard: {options.leaderboard}")
