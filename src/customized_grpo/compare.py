"""A study: methods x seeds from one YAML, run where they are missing, and one set of tables."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from customized_grpo.checkpoint import write_atomic
from customized_grpo.config import (
    Method,
    RunConfig,
    StudyConfig,
    dump_config,
    load_config,
    load_study,
    read_config,
)
from customized_grpo.errors import CheckpointError, ConfigError
from customized_grpo.evaluate import (
    EvaluationReport,
    evaluate_run,
    evaluation_file,
    judge_baselines,
)
from customized_grpo.results import Cell, Results, read_cell
from customized_grpo.trainer import WEIGHTS, train

logger = logging.getLogger("customized_grpo")

RESULTS = "results.json"
BASELINES = "baselines"
_POLL_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study's file, the configs of its methods and where results are kept."""

    file: Path
    config: StudyConfig
    methods: dict[str, RunConfig]
    results: Path
    """Folder of ``results.json``, tables, report and pictures."""

    @classmethod
    def load(cls, file: Path, results: Path | None = None) -> Study:
        """Reads the file.

        Raises:
            ConfigError: if it, or a method's config, is wrong.
        """
        config, methods = load_study(file)
        return cls(file=file, config=config, methods=methods, results=results or config.folder)

    @property
    def evaluation(self) -> str:
        """File of a run's evaluation."""
        return evaluation_file(self.config.split)

    def run_config(self, method: Method, seed: int) -> RunConfig:
        """Config of one cell."""
        return self.config.place(self.methods[method.name], method, seed)

    def cell(self, name: str) -> tuple[Method, int]:
        """The cell called ``METHOD/seedN``.

        Raises:
            ConfigError: if the study has none of that name.
        """
        cells = {f"{m.name}/seed{seed}": (m, seed) for m, seed in self.config.cells()}
        if name not in cells:
            raise ConfigError(f"--cell must be one of {', '.join(cells)}, got {name!r}")
        return cells[name]


def compare(study: Study, jobs: int) -> Results:
    """Runs what is missing, ``jobs`` cells at a time, and writes results after every cell.

    Raises:
        ConfigError: if a cell was run with another config.
        CheckpointError: if a cell's process failed; the others are finished first.
    """
    kept = _kept_cells(study)
    missing = [cell for cell in study.config.cells() if (cell[0].name, cell[1]) not in kept]
    baselines = _baselines(study, needed=bool(missing))
    failures: list[str] = []
    with _Progress(study, missing) as progress:
        for method, seed, log in _run_cells(study, missing, jobs, progress):
            if log is not None:
                failures.append(f"{method.name}/seed{seed} (see {log})")
                continue
            kept[method.name, seed] = _collect(study, method, seed)
            _write(study, baselines, kept)
    if failures:
        raise CheckpointError(
            f"compare: {len(failures)} of {len(missing)} cells failed: {', '.join(failures)}; "
            "mend the cause and run the same command again, finished cells are kept"
        )
    return _write(study, baselines, kept)


def results_of_runs(runs: Sequence[Path]) -> Results:
    """Results of evaluated run folders; runs that differ in their seed only are one method.

    Raises:
        CheckpointError: if a folder is not an evaluated run, or the runs were judged differently.
    """
    labels: dict[str, str] = {}
    methods: dict[str, str] = {}
    cells: list[Cell] = []
    first: EvaluationReport | None = None
    for run in runs:
        report = EvaluationReport.read(run / "evaluation.json")
        config = load_config(run / "config.yaml")
        kind = dump_config(replace(config, name="run", seed=0, output_dir="runs"))
        method = methods.setdefault(kind, str(run))
        labels.setdefault(method, method)
        cells.append(read_cell(run, method, config.seed, report.models["tuned"]))
        first = first or report
        if (report.count, report.prompts, report.objectives) != (
            first.count, first.prompts, first.objectives
        ):  # fmt: skip
            raise CheckpointError(
                f"RUN: {run} was judged on other examples or by other evaluators than {runs[0]}; "
                "evaluate all with the same data and evaluators"
            )
    assert first is not None, "the command line asks for one run at least"
    return Results(
        name=", ".join(labels.values()),
        objectives=first.objectives,
        baselines={name: j for name, j in first.models.items() if name != "tuned"},
        labels=labels,
        main=cells[0].method,
        prompts=first.prompts,
        cells=cells,
    )


def run_cell(study: Study, method: Method, seed: int) -> None:
    """Trains one cell in this process, unless that is done, and evaluates it."""
    config = study.run_config(method, seed)
    folder = Path(config.output_dir, config.name)
    if not (folder / WEIGHTS).exists():
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run has left
        train(config)
    baselines = study.config.folder / BASELINES / "evaluation.json"
    known = EvaluationReport.read(baselines).models
    evaluate_run(folder, study.config.split, known=known)


def _kept_cells(study: Study) -> dict[tuple[str, int], Cell]:
    """Finished cells of the study, from its results or its run folders."""
    file = study.results / RESULTS
    kept = {(c.method, c.seed): c for c in Results.read(file).cells} if file.exists() else {}
    cells: dict[tuple[str, int], Cell] = {}
    for method, seed in study.config.cells():
        wanted = study.run_config(method, seed)
        folder = Path(wanted.output_dir, wanted.name)
        cell = kept.get((method.name, seed))
        if cell is not None:
            _check_same(cell.config, wanted, f"{file}: cell {method.name}/seed{seed}")
        elif (folder / "config.yaml").exists():
            text = (folder / "config.yaml").read_text(encoding="utf-8")
            _check_same(text, wanted, str(folder))
            if (folder / study.evaluation).exists():
                cell = _collect(study, method, seed)
        if cell is not None:
            cells[method.name, seed] = cell
    return cells


def _check_same(text: str, wanted: RunConfig, where: str) -> None:
    found = read_config(text, where)  # fields that are newer than the run have their defaults
    if found == wanted:
        return
    lines = zip(dump_config(found).splitlines(), dump_config(wanted).splitlines(), strict=False)
    old, new = next(((a, b) for a, b in lines if a != b), ("fewer fields", "more"))
    raise ConfigError(
        f"{where} was run with another config ({old.strip()!r}, now {new.strip()!r}); give the "
        "study another name, or remove it"
    )


def _keep_picture(study: Study, picture: Path, name: str) -> None:
    folder = study.results / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(picture, folder / name)


def _collect(study: Study, method: Method, seed: int) -> Cell:
    config = study.run_config(method, seed)
    folder = Path(config.output_dir, config.name)
    judgement = EvaluationReport.read(folder / study.evaluation).models["tuned"]
    if seed == 0:
        _keep_picture(study, folder / "pictures" / "tuned.png", f"{method.name}.png")
    return read_cell(folder, method.name, seed, judgement)


def _baselines(study: Study, needed: bool) -> Results:
    """The study's results without cells: base and anchors, judged once for all."""
    file, folder = study.results / RESULTS, study.config.folder / BASELINES
    if file.exists() and not needed:
        return replace(Results.read(file), cells=[])
    if not (folder / "evaluation.json").exists():
        logger.info("judging the base and the anchors")
        judge_baselines(next(iter(study.methods.values())), study.config.split, folder)
    report = EvaluationReport.read(folder / "evaluation.json")
    for strip in sorted(folder.glob("*.png")):
        _keep_picture(study, strip, strip.name)
    return Results(
        name=study.config.name,
        objectives=report.objectives,
        baselines=report.models,
        labels={method.name: method.label for method in study.config.methods},
        main=study.config.main,
        prompts=report.prompts,
        cells=[],
    )


def _write(study: Study, baselines: Results, cells: dict[tuple[str, int], Cell]) -> Results:
    order = [(method.name, seed) for method, seed in study.config.cells()]
    results = replace(baselines, cells=[cells[key] for key in order if key in cells])
    study.results.mkdir(parents=True, exist_ok=True)
    results.write(study.results / RESULTS, write_atomic)
    # Tables are made of what was written, so that they are the same when they are made again.
    return Results.read(study.results / RESULTS)


def _run_cells(
    study: Study, cells: Sequence[tuple[Method, int]], jobs: int, progress: _Progress
) -> Iterator[tuple[Method, int, Path | None]]:
    """Runs cells in processes of their own; yields each as it ends, with its log if it failed."""
    executor = ThreadPoolExecutor(jobs)
    running: dict[Future[Path | None], tuple[Method, int]] = {
        executor.submit(_run_process, study, method, seed, jobs): (method, seed)
        for method, seed in cells
    }
    try:
        while running:
            done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            progress.show()
            for future in done:
                method, seed = running.pop(future)
                yield method, seed, future.result()
                progress.finished(method, seed)
    finally:
        executor.shutdown(cancel_futures=True)


def _run_process(study: Study, method: Method, seed: int, jobs: int) -> Path | None:
    """Runs one cell by ``cgrpo compare --cell``; returns its log if it failed."""
    name = f"{method.name}/seed{seed}"
    log = study.config.folder / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "customized_grpo", "compare", str(study.file), "--cell", name]
    threads = max(1, (os.cpu_count() or 1) // jobs)  # more than cores is slower than one by far
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
            check=False,
        )
    return log if done.returncode else None


class _Progress:
    """A bar over the updates of all cells on a terminal, a line per finished cell elsewhere."""

    def __init__(self, study: Study, cells: Sequence[tuple[Method, int]]) -> None:
        configs = [study.run_config(method, seed) for method, seed in cells]
        self._files = [Path(c.output_dir, c.name, "metrics.jsonl") for c in configs]
        self._total = sum(c.train.num_updates for c in configs)
        self._num_cells, self._num_finished = len(cells), 0
        self._started = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        if self._total and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} updates"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._bar.add_task(self._text(), total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _text(self) -> str:
        return f"{self._num_finished}/{self._num_cells} runs"

    def show(self) -> None:
        """Moves the bar to the updates that the cells have logged."""
        if self._bar is not None:
            done = sum(_count_updates(file) for file in self._files)
            self._bar.update(self._bar.task_ids[0], completed=done, description=self._text())

    def finished(self, method: Method, seed: int) -> None:
        """A cell has ended."""
        self._num_finished += 1
        if self._bar is None:
            minutes = (time.monotonic() - self._started) / 60
            left = minutes / self._num_finished * (self._num_cells - self._num_finished)
            logger.info(
                "%s: %s/seed%d, %.0f min left", self._text(), method.name, seed, left
            )  # fmt: skip


def _count_updates(file: Path) -> int:
    try:
        return sum(not line.startswith('{"update": 0,') for line in file.open(encoding="utf-8"))
    except FileNotFoundError:
        return 0
