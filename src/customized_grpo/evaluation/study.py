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

from filelock import FileLock, Timeout

from customized_grpo.config import (
    Method,
    RunConfig,
    StudyConfig,
    dump_config,
    first_difference,
    load_study,
    read_config,
)
from customized_grpo.errors import CheckpointError, ConfigError
from customized_grpo.evaluation.evaluate import Evaluation, Place, evaluate_run
from customized_grpo.evaluation.outcome import BASE, TUNED, Outcome, Yardstick
from customized_grpo.evaluation.results import Cell, Results, read_cell
from customized_grpo.files import write_atomic
from customized_grpo.pictures import save_strip
from customized_grpo.runs.files import CONFIG, FINISHED, METRICS
from customized_grpo.runs.run import Run
from customized_grpo.training.session import train

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
    kept = _read_results(study)
    yardstick = kept.yardstick if kept is not None else _judge_base(study)
    labels = {method.name: method.label for method in study.config.methods}
    if kept is not None:  # methods that the study no longer names keep their place
        labels |= {name: label for name, label in kept.labels.items() if name not in labels}
    cells = _finished_cells(study, yardstick, kept)
    missing = [cell for cell in study.config.cells() if (cell[0].name, cell[1]) not in cells]
    if missing and _judged_base(study) is None:  # the results are from another machine
        _save_base(study, yardstick)
    failures: list[str] = []
    with _Progress(study, missing) as progress:
        for method, seed, log in _run_cells(study, missing, min(jobs, len(missing)), progress):
            if log is not None:
                failures.append(f"{method.name}/seed{seed} (see {log})")
                continue
            cells[method.name, seed] = _collect(study, yardstick, method, seed)
            _write(study, yardstick, labels, cells)
    if failures:
        raise CheckpointError(
            f"compare: {len(failures)} of {len(missing)} cells failed: {', '.join(failures)}; "
            "mend the cause and run the same command again, finished cells are kept"
        )
    return _write(study, yardstick, labels, cells)


def results_of_runs(runs: Sequence[Path]) -> Results:
    """Results of evaluated run folders; runs that differ in their seed only are one method.

    Raises:
        CheckpointError: if a folder is not an evaluated run, the runs were judged differently, or
            two are the same method and seed.
    """
    labels: dict[str, str] = {}
    methods: dict[str, str] = {}
    cells: dict[tuple[str, int], Cell] = {}
    outcomes = [Outcome.read(Place(folder, "held_out").json) for folder in runs]
    opened = [Run.open(folder) for folder in runs]
    configs = [run.config for run in opened]
    for folder, run, outcome in zip(runs, opened, outcomes, strict=True):
        config = run.config
        if not run.is_finished:
            raise CheckpointError(f"RUN: {folder} is not finished; report it when it is")
        # What `cgrpo evaluate --num-examples` says counts, not the config.
        same_count = replace(config.evaluation, num_examples=configs[0].evaluation.num_examples)
        field = first_difference(configs[0], replace(config, evaluation=same_count))
        if field or not outcome.yardstick.agrees_with(outcomes[0].yardstick):
            raise CheckpointError(
                f"RUN: {folder} was judged otherwise than {runs[0]} ({field or 'other examples'}); "
                "report them apart, or evaluate both with the same data and evaluators"
            )
        kind = dump_config(replace(config, name="run", seed=0, output_dir="runs"))
        method = methods.setdefault(kind, str(folder))
        labels.setdefault(method, method)
        if (method, config.seed) in cells:
            raise CheckpointError(
                f"RUN: {folder} has the config and seed of {method}; leave one out"
            )
        cells[method, config.seed] = read_cell(folder, method, config.seed, outcome.own)
    return Results(
        name=", ".join(labels.values()),
        yardstick=outcomes[0].yardstick,
        labels=labels,
        main=next(iter(labels)),
        cells=list(cells.values()),
    )


def run_cell(study: Study, method: Method, seed: int) -> None:
    """Trains one cell in this process, unless that is done, and evaluates it.

    Raises:
        ConfigError: if its folder holds a run of another config.
        CheckpointError: if another process is at it.
    """
    config = study.run_config(method, seed)
    folder = Path(config.output_dir, config.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock", blocking=False):
            _check_folder(folder, config)
            if not (folder / FINISHED).exists():
                train(config, resume=True)
            evaluate_run(folder, study.config.split, known=_judged_base(study))
    except Timeout as error:
        raise CheckpointError(
            f"{folder} is being run by another process; wait for it, or end it"
        ) from error


def _read_results(study: Study) -> Results | None:
    """What is kept of an earlier call.

    Raises:
        ConfigError: if it is of another study, or was judged otherwise.
    """
    file = study.results / RESULTS
    if not file.exists():
        return None
    results, config = Results.read(file), next(iter(study.methods.values()))
    found = {"name": results.name, "split": results.yardstick.set}
    for field, value in found.items():
        if value != getattr(study.config, field):
            raise ConfigError(
                f"{study.file}: {field} is {getattr(study.config, field)!r}, but {value!r} in "
                f"{file}; choose another --results folder, or another name"
            )
    for cell in results.cells:
        if field := first_difference(read_config(cell.config, str(file)), config):
            raise ConfigError(
                f"{study.file}: {field} is another one than in {file}, cell "
                f"{cell.method}/seed{cell.seed}; give the study another name"
            )
    return results


def _finished_cells(
    study: Study, yardstick: Yardstick, kept: Results | None
) -> dict[tuple[str, int], Cell]:
    """Cells that are kept in the results, or whose run folder is finished."""
    cells = {(c.method, c.seed): c for c in kept.cells} if kept else {}
    for method, seed in study.config.cells():
        wanted = study.run_config(method, seed)
        folder = Path(wanted.output_dir, wanted.name)
        cell = cells.get((method.name, seed))
        if cell is not None:
            where = f"{study.results / RESULTS}: cell {method.name}/seed{seed}"
            _check_same(cell.config, wanted, where)
        else:
            _check_folder(folder, wanted)
            evaluated = Place(folder, study.config.split).json
            if (folder / FINISHED).exists() and evaluated.exists():
                cells[method.name, seed] = _collect(study, yardstick, method, seed)
    return cells


def _check_folder(folder: Path, wanted: RunConfig) -> None:
    file = folder / CONFIG
    if file.exists():
        _check_same(file.read_text(encoding="utf-8"), wanted, str(folder))


def _check_same(text: str, wanted: RunConfig, where: str) -> None:
    found = read_config(text, where)  # fields that are newer than the run have their defaults
    # How fast, and who is told; not what.
    found = replace(found, device=wanted.device, compile=wanted.compile, sinks=wanted.sinks)
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


def _collect(study: Study, yardstick: Yardstick, method: Method, seed: int) -> Cell:
    """Reads a finished run folder, and makes sure that it is what the study asks for."""
    config = study.run_config(method, seed)
    folder = Path(config.output_dir, config.name)
    _check_folder(folder, config)
    place = Place(folder, study.config.split)
    outcome = Outcome.read(place.json)
    if not outcome.yardstick.agrees_with(yardstick):
        raise CheckpointError(
            f"{folder} was judged on other examples or by other evaluators than the study's base; "
            f"remove {place.json.name} in it"
        )
    if seed == 0:
        _keep_picture(study, place.strip(TUNED), f"{method.name}.png")
    return read_cell(folder, method.name, seed, outcome.own)


def _judged_base(study: Study) -> Yardstick | None:
    """The study's base and anchors, if they have been judged."""
    folder = study.config.folder / BASELINES
    if not (folder / RESULTS).exists():
        return None
    config = next(iter(study.methods.values()))
    judged = read_config((folder / CONFIG).read_text(encoding="utf-8"), str(folder))
    if field := first_difference(judged, config):
        raise ConfigError(
            f"{folder}: the base was judged with another {field}; give the study another name, or "
            "remove the folder"
        )
    return Results.read(folder / RESULTS).yardstick


def _judge_base(study: Study) -> Yardstick:
    """Judges base and anchors once for all cells, and keeps their pictures."""
    folder = study.config.folder / BASELINES
    if _judged_base(study) is None:
        logger.info("judging the base and the anchors")
        evaluation = Evaluation(next(iter(study.methods.values())), study.config.split)
        yardstick = evaluation.yardstick()
        for name, images in (evaluation.truth() | {BASE: evaluation.pictures()}).items():
            save_strip(folder / f"{name.replace(' ', '-')}.png", images)
        _save_base(study, yardstick)
    for strip in sorted(folder.glob("*.png")):
        _keep_picture(study, strip, strip.name)
    return Results.read(folder / RESULTS).yardstick


def _save_base(study: Study, yardstick: Yardstick) -> None:
    """Where the cells' processes find it."""
    folder = study.config.folder / BASELINES
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / CONFIG, dump_config(next(iter(study.methods.values()))))
    base = Results(name=study.config.name, yardstick=yardstick, labels={}, main="", cells=[])
    base.write(folder / RESULTS)


def _write(
    study: Study, yardstick: Yardstick, labels: dict[str, str], cells: dict[tuple[str, int], Cell]
) -> Results:
    order = [(method.name, seed) for method, seed in study.config.cells()]
    others = [key for key in cells if key not in order]
    results = Results(
        name=study.config.name,
        yardstick=yardstick,
        labels=labels,
        main=study.config.main,
        cells=[cells[key] for key in (*order, *others) if key in cells],
    )
    study.results.mkdir(parents=True, exist_ok=True)
    results.write(study.results / RESULTS)
    # Tables are made of what was written, so that they are the same when they are made again.
    return Results.read(study.results / RESULTS)


def _run_cells(
    study: Study, cells: Sequence[tuple[Method, int]], jobs: int, progress: _Progress
) -> Iterator[tuple[Method, int, Path | None]]:
    """Runs cells in processes of their own; yields each as it ends, with its log if it failed."""
    executor = ThreadPoolExecutor(max(1, jobs))
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
        self._files = [Path(c.output_dir, c.name, METRICS) for c in configs]
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
