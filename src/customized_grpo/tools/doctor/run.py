"""What a planned run needs of this machine: device, folders, its earlier state, its data."""

from __future__ import annotations

import logging
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from logging.handlers import BufferingHandler
from pathlib import Path

import torch
from torch.nn import Parameter

from customized_grpo.assets import one_line
from customized_grpo.config import RunConfig
from customized_grpo.data.base import DataSource
from customized_grpo.data.overview import count_lines, long_prompt_lines
from customized_grpo.devices import pick_device
from customized_grpo.errors import ConfigError, CustomizedGRPOError, DataError, within
from customized_grpo.runs.checkpoint import newest_checkpoint
from customized_grpo.runs.files import checkpoint_folders, finished_updates, holds_run
from customized_grpo.runs.log import lock_folder, run_folder
from customized_grpo.tools.doctor.findings import Finding, from_error, ok, problem, warning
from customized_grpo.tools.doctor.machine import disk, existing
from customized_grpo.tools.estimate.votes import count_votes
from customized_grpo.tools.estimate.workload import Workload
from customized_grpo.training.build import make_optimizer

_PROBE_BYTES = 2**20
_MANY_VOTES, _MANY_PICTURES = 32, 9  # some minutes of one person; the keys 1 to 9


def settings(config: RunConfig) -> Iterator[Finding]:
    """Fields that need something of the machine or of another package."""
    for check, build in (
        ("device", lambda: pick_device(config.device)),
        ("train", lambda: make_optimizer([Parameter(torch.zeros(1))], config.train)),
    ):
        try:
            build()
        except ConfigError as error:
            yield from_error(check, error)


def plugs(config: RunConfig) -> Iterator[Finding]:
    """What the plugs say of themselves: an error is a problem, what they log a warning."""
    for section, plug in config.plugs().items():
        texts: list[str] = []
        try:
            with _logged(texts), one_line(section):  # a plug of others raises anything
                plug.check()
        except CustomizedGRPOError as error:
            yield from_error(section, error)
            continue
        for text in texts:
            finding = from_error(section, ConfigError(text), "nothing, if it is meant")
            yield replace(finding, status="warning")
        if not texts and plug is not config.data and (hosts := plug.hosts()):
            yield ok(section, f"it uses {', '.join(host.name for host in hosts)}")


@contextmanager
def _logged(texts: list[str]) -> Iterator[None]:
    """Collects this package's warnings instead of printing them."""

    logger, collector = logging.getLogger("customized_grpo"), BufferingHandler(1000)
    before = logger.handlers, logger.propagate
    collector.setLevel(logging.WARNING)
    logger.handlers, logger.propagate = [collector], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before
        texts += [record.getMessage() for record in collector.buffer]


def votes(config: RunConfig) -> Iterator[Finding]:
    """How often people are asked, and whether that is more than they will answer."""
    for count in count_votes(config):
        if count.per_rollout > _MANY_VOTES or count.group_size > _MANY_PICTURES:
            fix = f"at most {_MANY_VOTES} votes a rollout and {_MANY_PICTURES} pictures: lower "
            yield warning("votes", str(count), f"{fix}rollout.prompts_per_rollout and group_size")
        else:
            yield ok("votes", str(count))


def folders(config: RunConfig, work: Workload | None) -> Iterator[Finding]:
    """Where a run writes: whether it may, and whether there is room for its checkpoints."""
    yield _writable("output_dir", Path(config.output_dir))
    if config.cache.folder is not None:
        yield _writable("cache.folder", Path(config.cache.folder))
    check, folder = "disk of output_dir", Path(config.output_dir)
    if work is None:
        yield disk(check, folder)
    else:
        yield disk(check, folder, _checkpoint_bytes(work), "its checkpoints")


def _writable(field: str, folder: Path) -> Finding:
    """Found by writing, which a full disk refuses too."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
    except OSError as error:
        fix = f"make it writable, or set {field} to another folder"
        return problem(field, f"{folder} cannot be written: {error.strerror or error}", fix)
    return ok(field, f"{folder} can be written")


def _checkpoint_bytes(work: Workload) -> float:
    """Size of all that are kept and one more: float32 weights twice, AdamW's moments."""
    train = work.config.train
    copies = 4 if train.ema_decay is None else 5
    kept = train.keep_checkpoints + 2 if train.saves else 1  # the best one, and the next
    return kept * copies * 4 * work.transformer.trained


def state(config: RunConfig, *, resumes: bool) -> Iterator[Finding]:
    """Whether the run's folder is free, or holds what a run that resumes needs."""
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
    """Whether examples are found, readable and enough."""
    if hosts := config.data.hosts():
        found = f"would be fetched from {hosts[0].name}: not opened"
        yield warning("data", found, "nothing, or name a folder that holds them")
        return
    try:
        with within("data"), one_line("data", DataError):  # a plug of others raises anything
            source: DataSource = config.data.build(config.seed)
            source.training(0, config.rollout.prompts_per_rollout)
            if config.evaluation.validate_every:
                source.validation(1)
    except CustomizedGRPOError as error:
        yield from_error("data", error)
    else:
        yield ok("data", "; ".join(count_lines(source)).replace(":;  ", ":"))  # a list's head
        for line in long_prompt_lines(config, source):
            yield warning("data", line, "shorten them, or take a model that reads more")
