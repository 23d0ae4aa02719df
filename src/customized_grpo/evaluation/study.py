"""A study: methods x seeds from one YAML, run where they are missing, and one set of tables."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from customized_grpo.config import (
    Method,
    RunConfig,
    StudyConfig,
    added_method,
    dump_config,
    first_difference,
    load_study,
    read_config,
)
from customized_grpo.config.names import BASE, TAKEN
from customized_grpo.devices import process_cores
from customized_grpo.errors import CheckpointError, ConfigError
from customized_grpo.evaluation.evaluate import Evaluation, Place, current_outcome, evaluate_run
from customized_grpo.evaluation.outcome import TUNED, Outcome, Yardstick
from customized_grpo.evaluation.results import Cell, Results, read_cell
from customized_grpo.pictures import save_strip
from customized_grpo.runs.files import CONFIG, FINISHED
from customized_grpo.runs.run import Run
from customized_grpo.training.train import train

logger = logging.getLogger("customized_grpo")

RESULTS = "results.json"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run that a study asks for."""

    method: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """``METHOD/seedN``, as ``--cell`` takes it."""
        return f"{self.method}/seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        return Path(self.config.output_dir, self.config.name)

    def check(self, found: str, where: str) -> None:
        """Makes sure that a config that was run, as YAML, is the one that is asked for."""
        config = read_config(found, where)  # fields that are newer than the run have their defaults
        # How fast, who is told and where it lies; not what.
        names = ("device", "compile", "sinks", "output_dir")
        free = {name: getattr(self.config, name) for name in names}
        if (config := replace(config, **free)) == self.config:
            return
        texts = (dump_config(c).splitlines() for c in (config, self.config))
        changed = ((a, b) for a, b in zip(*texts, strict=False) if a != b)
        old, new = next(changed, ("fewer fields", "more"))
        raise ConfigError(
            f"{where} was run with another config ({old.strip()!r}, now {new.strip()!r}); give the "
            "study another name, or remove it"
        )

    def check_folder(self) -> None:
        """Makes sure that no run of another config lies there."""
        file = self.folder / CONFIG
        if file.exists():
            self.check(file.read_text(encoding="utf-8"), str(self.folder))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study's file, the runs it asks for and where results are kept."""

    file: Path
    config: StudyConfig
    tasks: tuple[Task, ...]
    results: Path
    """Folder of ``results.json``, tables, report and pictures."""
    added: tuple[Method, ...] = ()
    """The last methods of ``config``, which the file does not have."""

    @classmethod
    def load(cls, file: Path, results: Path | None = None, add: Sequence[str] = ()) -> Study:
        """Reads the file and the config of every method.

        ``add``: further methods, as ``added_method`` reads them.
        """
        added = tuple(map(added_method, add))
        config, methods = load_study(file, added)
        tasks = (
            Task(method=m.name, seed=s, config=config.place(methods[m.name], m, s))
            for m, s in config.cells()
        )
        results = results or config.folder
        return cls(file=file, config=config, tasks=tuple(tasks), results=results, added=added)

    @property
    def judges(self) -> RunConfig:
        """A config with the base, examples and evaluators that all methods share."""
        return self.tasks[0].config

    def chosen(self, methods: Sequence[str], num_seeds: int | None) -> list[Task]:
        """Runs of some methods (() = all) and of the first seeds (None = all).

        Raises:
            ConfigError: if a method is none of the study's.
        """
        known = list(dict.fromkeys(task.method for task in self.tasks))
        if unknown := next((name for name in methods if name not in known), None):
            raise ConfigError(f"--methods must be of {', '.join(known)}, got {unknown!r}")
        return [
            task
            for task in self.tasks
            if task.method in (methods or known) and (num_seeds is None or task.seed < num_seeds)
        ]

    def task(self, name: str) -> Task:
        """The run called ``METHOD/seedN``."""
        tasks = {task.name: task for task in self.tasks}
        if name not in tasks:
            raise ConfigError(f"--cell must be one of {', '.join(tasks)}, got {name!r}")
        return tasks[name]

    def place(self, task: Task) -> Place:
        """Where a run keeps its evaluation."""
        return Place(task.folder, self.config.split)


def compare(
    study: Study, jobs: int, methods: Sequence[str] = (), num_seeds: int | None = None
) -> Results:
    """Runs what is missing, ``jobs`` runs at a time, and writes results after every one.

    Args:
        study: what is compared.
        jobs: runs at a time, each in a process of its own.
        methods: names of those to run now; () = all.
        num_seeds: seeds to run now, the first ones; None = all.

    Raises:
        ConfigError: if one was run with another config.
        CheckpointError: if a run's process failed; the others are finished first.
    """
    chosen = study.chosen(methods, num_seeds)
    kept = _read_results(study) or _judge_base(study)
    cells = {f"{cell.method}/seed{cell.seed}": cell for cell in kept.cells}
    for task in study.tasks:
        if task.name in cells:
            task.check(cells[task.name].config, f"{study.results / RESULTS}: cell {task.name}")
            continue
        task.check_folder()
        if (task.folder / FINISHED).exists() and study.place(task).json.exists():
            cells[task.name] = _collect(study, kept.yardstick, task)
    missing = [task for task in chosen if task.name not in cells]
    failures: list[str] = []
    for task, log in _run(study, missing, jobs):
        if log is None:
            cells[task.name] = _collect(study, kept.yardstick, task)
            _write(study, kept, cells)
        else:
            failures.append(f"{task.name} (see {log})")
    if failures:
        raise CheckpointError(
            f"compare: {len(failures)} of {len(missing)} cells failed: {', '.join(failures)}; "
            "mend the cause and run the same command again, finished cells are kept"
        )
    return _write(study, kept, cells)


def results_of_runs(folders: Sequence[Path]) -> Results:
    """Results of evaluated run folders; runs that differ in their seed only are one method.

    Raises:
        CheckpointError: if a folder is not an evaluated run, or its weights have changed since, the
            runs were judged differently, or two are the same method and seed.
    """
    runs = [Run.open(folder) for folder in folders]
    outcomes = [current_outcome(run) for run in runs]
    methods: dict[str, str] = {}
    cells: dict[tuple[str, int], Cell] = {}
    for folder, run, outcome in zip(folders, runs, outcomes, strict=True):
        if not run.is_finished:
            raise CheckpointError(f"RUN: {folder} is not finished; report it when it is")
        first = runs[0].config
        # What `cgrpo evaluate --num-examples` says counts, not the config.
        count = replace(run.config.evaluation, num_examples=first.evaluation.num_examples)
        field = first_difference(first, replace(run.config, evaluation=count))
        if field or not outcome.yardstick.agrees_with(outcomes[0].yardstick):
            raise CheckpointError(
                f"RUN: {folder} was judged otherwise than {folders[0]} "
                f"({field or 'other examples'}); report them apart, or evaluate both with the same "
                "data and evaluators"
            )
        kind = dump_config(replace(run.config, name="run", seed=0, output_dir="runs"))
        method, seed = methods.setdefault(kind, str(folder)), run.config.seed
        if (method, seed) in cells:
            raise CheckpointError(
                f"RUN: {folder} has the config and seed of {method}; leave one out"
            )
        cells[method, seed] = read_cell(folder, method, seed, outcome.own)
    labels = _labels(list(methods.values()))
    return Results(
        name=runs[0].config.name if len(labels) == 1 else ", ".join(labels.values()),
        config=dump_config(runs[0].config),
        yardstick=outcomes[0].yardstick,
        labels=labels,
        main=str(folders[0]),
        cells=list(cells.values()),
    )


def _labels(methods: Sequence[str]) -> dict[str, str]:
    """What the page calls runs: the one there is "tuned", others by their folders' names, or by
    their paths where these are alike; none like what it shows beside them."""
    if len(methods) == 1:
        return {methods[0]: TUNED}
    names = [Path(method).resolve().name for method in methods]
    labels = names if len(set(names)) == len(names) else methods
    return _told_apart(dict(zip(methods, labels, strict=True)))


def _told_apart(labels: Mapping[str, str]) -> dict[str, str]:
    """Method -> its label, or ``LABEL (METHOD)`` where the label is an earlier one's or an
    anchor's: what a report shows under one of two equal headings would be lost."""
    apart: dict[str, str] = {}
    for method, label in labels.items():
        is_taken = label in (*TAKEN, *apart.values())
        apart[method] = f"{label} ({method})" if is_taken else label
    return apart


def run_task(study: Study, task: Task) -> None:
    """Trains one run in this process, unless that is done, and evaluates it.

    Raises:
        ConfigError: if its folder holds a run of another config.
        CheckpointError: if another process is at it.
    """
    task.folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{task.folder}.lock", blocking=False):
            task.check_folder()
            if not (task.folder / FINISHED).exists():
                train(task.config, resume=True)
            kept = _read_results(study)
            known = None if kept is None else kept.yardstick
            evaluate_run(task.folder, study.config.split, known=known)
    except Timeout as error:
        raise CheckpointError(
            f"{task.folder} is being run by another process; wait for it, or end it"
        ) from error


def _read_results(study: Study) -> Results | None:
    """What is kept of an earlier call, which must be of the same study, judged alike."""
    file = study.results / RESULTS
    if not file.exists():
        return None
    results = Results.read(file)
    found = {"name": results.name, "split": results.yardstick.set}
    for field, value in found.items():
        if value != getattr(study.config, field):
            raise ConfigError(
                f"{study.file}: {field} is {getattr(study.config, field)!r}, but {value!r} in "
                f"{file}; choose another --results folder, or another name"
            )
    if field := first_difference(read_config(results.config, str(file)), study.judges):
        raise ConfigError(
            f"{study.file}: {field} is another one than in {file}; give the study another name"
        )
    return results


def _collect(study: Study, yardstick: Yardstick, task: Task) -> Cell:
    """Reads a finished run, and makes sure that it was judged as the base was."""
    place = study.place(task)
    outcome = Outcome.read(place.json)
    if outcome.weights not in (None, Run.open(task.folder).digest):
        raise CheckpointError(
            f"{place.json} must be of the weights that the run has now, it is of other ones; "
            "remove it, and it is made again"
        )
    if not outcome.yardstick.agrees_with(yardstick):
        raise CheckpointError(
            f"{task.folder} was judged on other examples or by other evaluators than the study's "
            f"base; remove {place.json.name} in it"
        )
    if task.seed == 0:
        pictures = study.results / "pictures"
        pictures.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place.strip(TUNED), pictures / f"{task.method}.png")
    return read_cell(task.folder, task.method, task.seed, outcome.own)


def _judge_base(study: Study) -> Results:
    """Judges base and anchors once for all runs, which find them in the results."""
    logger.info("judging the base and the anchors")
    evaluation = Evaluation(study.judges, study.config.split)
    yardstick = evaluation.yardstick()
    for name, images in (evaluation.truth() | {BASE: evaluation.pictures()}).items():
        save_strip(study.results / "pictures" / f"{name.replace(' ', '-')}.png", images)
    empty = Results(
        name=study.config.name,
        config=dump_config(study.judges),
        yardstick=yardstick,
        labels={},
        main=study.config.main,
        cells=[],
    )
    return _write(study, empty, {})


def _write(study: Study, kept: Results, cells: dict[str, Cell]) -> Results:
    own = {method.name: method.label for method in study.config.methods}
    labels = _told_apart(own | {n: label for n, label in kept.labels.items() if n not in own})
    order = {name: place for place, name in enumerate(labels)}
    results = replace(
        kept,
        config=dump_config(study.judges),
        labels=labels,
        main=study.config.main,
        cells=sorted(cells.values(), key=lambda cell: (order[cell.method], cell.seed)),
    )
    study.results.mkdir(parents=True, exist_ok=True)
    results.write(study.results / RESULTS)
    # Tables are made of what was written, so that they are the same when they are made again.
    return Results.read(study.results / RESULTS)


def _run(study: Study, tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, Path | None]]:
    """Runs tasks in processes of their own; yields each as it ends, with its log if it failed."""
    jobs = max(1, min(jobs, len(tasks)))
    executor = ThreadPoolExecutor(jobs)
    running = {executor.submit(_run_process, study, task, jobs): task for task in tasks}
    try:
        for done, future in enumerate(as_completed(running), start=1):
            logger.info("%d/%d runs: %s", done, len(tasks), running[future].name)
            yield running[future], future.result()
    finally:
        executor.shutdown(cancel_futures=True)


def _run_process(study: Study, task: Task, jobs: int) -> Path | None:
    """Runs one task by ``cgrpo compare --cell``; returns its log if it failed."""
    log = study.config.folder / f"{task.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "customized_grpo", "compare", str(study.file)]
    command += ["--results", str(study.results), "--cell", task.name]
    for method in study.added:
        command += ["--add", f"{method.name}={json.dumps(method.overrides)}"]
    threads = max(1, process_cores() // jobs)  # more than cores is slower than one by far
    env = {"OMP_NUM_THREADS": str(threads), **os.environ}
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=env
        )
    return log if done.returncode else None
