"""What a planned run needs of this machine: device, folders, its earlier state, its data."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from customized_grpo.assets import one_line
from customized_grpo.config import RunConfig
from customized_grpo.data.base import DataSource
from customized_grpo.data.overview import count_lines
from customized_grpo.data.subjects200k import Subjects200KConfig
from customized_grpo.devices import pick_device
from customized_grpo.errors import ConfigError, CustomizedGRPOError, DataError, within
from customized_grpo.generators.pipeline import PipelineConfig, quantization_config
from customized_grpo.rewards.hpsv3 import Hpsv3Config, read_instruction
from customized_grpo.runs.checkpoint import newest_checkpoint
from customized_grpo.runs.files import checkpoint_folders, finished_updates, holds_run
from customized_grpo.runs.log import lock_folder, run_folder
from customized_grpo.tools.doctor.findings import Finding, from_error, ok, problem, warning
from customized_grpo.tools.doctor.machine import Machine, disk, existing
from customized_grpo.tools.estimate.workload import Workload
from customized_grpo.training.build import make_optimizer

_PROBE_BYTES = 2**20


def settings(config: RunConfig, machine: Machine) -> Iterator[Finding]:
    """Fields that need something of the machine or of another package."""
    yield from _refused("device", lambda: pick_device(config.device))
    yield from _refused("train", lambda: _make_optimizer(config))
    generator: Any = config.generator
    if isinstance(generator, PipelineConfig) and generator.quantization is not None:
        kind = generator.quantization
        yield from _refused("generator", lambda: quantization_config(kind))
    for section in ("rewards", "evaluators"):
        for number, reward in enumerate(getattr(config, section)):
            if isinstance(reward, Hpsv3Config):
                path = reward.instruction
                fix = "write it as docs/rewards.md says"
                check, read = f"{section}.{number}", lambda path=path: read_instruction(path)
                yield from (replace(f, fix=fix) for f in _refused(check, read))
    for number, sink in enumerate(config.sinks):
        yield from _refused(f"sinks.{number}", sink.check)
    place = machine.place(config.device)
    half = "bfloat16" if getattr(generator, "dtype", None) == "bfloat16" else config.mixed_precision
    if half in ("bfloat16", "bf16") and not place.bf16:
        fix = "mixed_precision: no and generator.dtype: float32, or other hardware"
        yield warning("mixed_precision", f"{half}: {place.name} emulates it, slowly", fix)


def _make_optimizer(config: RunConfig) -> None:
    import torch

    make_optimizer([torch.nn.Parameter(torch.zeros(1))], config.train)


def _refused(check: str, build: Callable[[], object]) -> Iterator[Finding]:
    """A problem if the part of a run cannot be built."""
    try:
        build()
    except ConfigError as error:
        yield from_error(check, error)


def folders(config: RunConfig, work: Workload | None) -> Iterator[Finding]:
    """Where a run writes: may it, and is there room for its checkpoints?"""
    paths = {"output_dir": config.output_dir, "cache.folder": config.cache.folder}
    for field, path in paths.items():
        if path is None:
            continue
        if error := _write_error(Path(path)):
            fix = f"make it writable, or set {field} to another folder"
            yield problem(field, f"{path} cannot be written: {error}", fix)
        else:
            yield ok(field, f"{path} can be written")
    size = None if work is None else _checkpoint_bytes(work)
    yield disk("disk of output_dir", Path(config.output_dir), size, "its checkpoints")


def _write_error(folder: Path) -> str | None:
    """By writing, which also a full disk or a quota refuses; nothing stays."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _checkpoint_bytes(work: Workload) -> float:
    """Of all that are there while one more is written: float32 weights twice, AdamW's moments."""
    train = work.config.train
    copies = 4 if train.ema_decay is None else 5
    kept = train.keep_checkpoints + 2 if train.save_every else 1  # the best one, and the next
    return kept * copies * 4 * work.transformer.trained


def state(config: RunConfig, *, resumes: bool) -> Iterator[Finding]:
    """A run that is there already.

    Args:
        config: of the run.
        resumes: RUN was given, which is to be gone on with.
    """
    folder = Path(config.output_dir) / config.name
    if resumes:
        yield from _resumed(folder)
        return
    try:
        run_folder(config)
    except ConfigError as error:
        fix = "choose another --name or remove the folder"
        resume = shlex.join(["cgrpo", "resume", str(folder)])
        fix += f", or go on: `{resume}`" if holds_run(folder) else ""
        yield problem("name", str(error).removeprefix("name: ").split(";")[0], fix)
    else:
        yield ok("name", f"{folder} is free")


def _resumed(folder: Path) -> Iterator[Finding]:
    try:
        with lock_folder(folder):
            pass
        newest = newest_checkpoint(folder)
    except (CustomizedGRPOError, OSError) as error:
        yield from_error("run", error, "make its folder readable and writable")
        return
    done = finished_updates(folder)
    if newest is not None and newest.folder != checkpoint_folders(folder)[-1]:
        fix = "nothing, or bring it back from a copy"
        damaged = checkpoint_folders(folder)[-1].name
        yield warning("checkpoint", f"{damaged} is damaged, {newest.folder.name} is taken", fix)
    if done is not None:
        yield ok("run", f"{folder} is finished, after {done} updates")
    elif newest is None:
        fix = "nothing, or set train.save_every"
        yield warning("run", f"{folder} has no checkpoint: it would begin at update 0", fix)
    else:
        yield ok("run", f"{folder} goes on after update {newest.update}")


def data(config: RunConfig) -> Iterator[Finding]:
    """Found, readable and enough."""
    section = config.data
    if isinstance(section, Subjects200KConfig) and not Path(section.path).is_dir():
        fix = "nothing, or name a folder with its parquet files"
        yield warning("data", f"{section.path} would be fetched from the hub: not opened", fix)
        return
    try:
        with within("data"), one_line("data", DataError):  # a plug of others raises anything
            source: DataSource = section.build(config.seed)
            source.training(0, config.rollout.prompts_per_rollout)
            if config.evaluation.validate_every:
                source.validation(1)
    except CustomizedGRPOError as error:
        yield from_error("data", error)
    else:
        yield ok("data", "; ".join(count_lines(source)))
