"""All checks, in the order in which they make sense.

Imports stand where they are needed: a package that is missing or broken is a finding, not the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from customized_grpo.errors import ConfigError
from customized_grpo.runs.files import check_run
from customized_grpo.tools.doctor.findings import Finding, from_error, ok, problem
from customized_grpo.tools.doctor.packages import packages

if TYPE_CHECKING:
    from customized_grpo.config import RunConfig
    from customized_grpo.tools.doctor.machine import Machine


def examine(target: Path | None, overrides: Sequence[str]) -> Iterator[Finding]:
    """Findings about this machine and a target, a config or the folder of a run; None: what fits.

    Raises:
        ConfigError: if there is no such target.
        CheckpointError: if it is a folder without a run.
    """
    if target is not None and not (target.is_file() or (target / "config.yaml").is_file()):
        raise ConfigError(
            f"CONFIG must be a YAML file or the folder of a run, got {str(target)!r}; correct it"
        )
    if target is not None and target.is_dir():
        check_run(target)
    yield from packages()
    if broken := _import_error():
        yield broken
        return
    from huggingface_hub import constants

    from customized_grpo.tools.doctor.machine import disk, hardware, look

    machine = look()
    yield from hardware(machine)
    yield disk("disk of the hub's cache", Path(constants.HF_HUB_CACHE))
    if target is None:
        yield disk("disk of runs", Path("runs"))
        yield from _what_fits(machine)
        return
    from customized_grpo.config import load_config
    from customized_grpo.runs.run import Run

    try:
        if target.is_dir():
            config = Run.open(target, overrides).config
        else:
            config = load_config(target, overrides)
    except ConfigError as error:
        yield from_error("config", error)
        return
    yield ok("config", f"{target} is valid")
    yield from _planned(config, machine, resumes=target.is_dir())


def _import_error() -> Finding | None:
    try:
        from customized_grpo.tools.doctor import run  # noqa: F401  # and with it everything else
    except Exception as error:  # a library that is missing is an OSError, others are anything
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return problem("import", text, "pip install --force-reinstall PACKAGE, of the one named")
    return None


def _planned(config: RunConfig, machine: Machine, *, resumes: bool) -> Iterator[Finding]:
    from customized_grpo.tools.doctor import run
    from customized_grpo.tools.doctor.memory import loading, memory, predict, time_on_cpu
    from customized_grpo.tools.doctor.weights import weights

    yield from run.settings(config)
    yield from run.plugs(config)
    yield from run.votes(config)
    yield from run.state(config, resumes=resumes)
    yield from weights(config)
    yield from run.data(config)
    work = None
    try:
        work = predict(config)
        yield memory("memory", work, machine)
        yield loading(work, machine) if machine.place(config.device).is_gpu else time_on_cpu(work)
    except ConfigError as error:
        yield dataclasses.replace(from_error("memory", error), status="warning")
    yield from run.folders(config, work)


def _what_fits(machine: Machine) -> Iterator[Finding]:
    from customized_grpo.config import load_config
    from customized_grpo.config.shipped import shipped_config
    from customized_grpo.tools.doctor.memory import what_fits

    for file in sorted(shipped_config("emoji.yaml").parent.glob("*.yaml")):
        yield what_fits(f"fits: {file.name}", load_config(file), machine)
