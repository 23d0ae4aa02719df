"""A rehearsal: two rollouts of a run and their updates on its device, before hours of it are paid.

It is the run itself, by the trainer itself, in a folder of its own that is deleted; what is
measured is the second rollout, as the first one compiles and fills caches.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import resource
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from customized_grpo.config import RunConfig
from customized_grpo.devices import is_out_of_memory, pick_device
from customized_grpo.errors import ConfigError, CustomizedGRPOError
from customized_grpo.evaluation.tables import Table
from customized_grpo.files import read_number
from customized_grpo.rewards.votes import DrawnVotesConfig, VotesConfig
from customized_grpo.runs.files import SAMPLES, MetricsReader
from customized_grpo.runs.log import run_folder
from customized_grpo.runs.progress import duration
from customized_grpo.tools.doctor.machine import look
from customized_grpo.tools.doctor.memory import predict, what_to_lower
from customized_grpo.tools.estimate.cost import TIGHT, Cluster, Estimate, assumed_mfu, estimate
from customized_grpo.tools.estimate.devices import device_called, find_device
from customized_grpo.tools.estimate.judges import num_validations
from customized_grpo.tools.estimate.votes import count_votes
from customized_grpo.tools.estimate.workload import Workload
from customized_grpo.training.train import train

logger = logging.getLogger("customized_grpo")

_ROLLOUTS = 2
_AFTER_FAILURE = 0.8  # of the memory: more is predicted to fit, and did not
_RARE = ("seconds/validation", "seconds/checkpoint", "seconds/samples")

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a rehearsal took, in this process."""

    seconds: float
    """Of an update, with its share of a rollout."""
    validation: float
    """Seconds of one; 0: there is none."""
    peak: float
    """Bytes: reserved on the GPU, or resident in RAM."""
    micro_batch_size: int | None
    """What fitted, where the config's did not."""


def rehearse(config: RunConfig, price: float | None, picture: Path) -> list[str]:
    """Rehearses a run; returns what it says, a line each; nothing but the picture is left.

    Args:
        config: of the run.
        price: of one device for one hour; None: not known.
        picture: where the last sample pictures go.

    Raises:
        CustomizedGRPOError: as the run would; where memory runs out, with what to lower first.
    """
    small = _shortened(config)
    logger.info(
        "rehearsal of %s: %d rollouts of it, in a folder that is deleted", config.name, _ROLLOUTS
    )
    folder, output_dir = run_folder(small), Path(config.output_dir)
    is_first, is_new = read_number("RANK", 0) == 0, not output_dir.exists()
    try:
        train(small)
        reader = MetricsReader(folder)
        if is_first:
            reader.read()
            schedule = json.loads((folder / "schedule.json").read_text(encoding="utf-8"))
            shutil.copyfile(sorted((folder / SAMPLES).iterdir())[-1], picture)
    except CustomizedGRPOError as error:
        error.args = (_explained(error, config),)
        raise
    finally:
        if is_first:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # others may have put something there
                if is_new:
                    output_dir.rmdir()
    if not is_first:
        return []
    measured = _measured(reader.rows, config.train.inner_updates, pick_device(config.device))
    votes = [f"not rehearsed, drawn by lot: {count}" for count in count_votes(config)]
    remarks = votes or _copying(config, reader.rows, schedule)  # lots do not know what a copy is
    return [*_report(config, measured, price), *remarks, f"picture: {picture}"]


def _shortened(config: RunConfig) -> RunConfig:
    updates = _ROLLOUTS * config.train.inner_updates
    train_config = dataclasses.replace(
        config.train, num_updates=updates, sample_every=0, save_every=config.train.inner_updates
    )
    return dataclasses.replace(
        config,
        name=f"rehearsal-of-{config.name}",
        train=train_config,
        rewards=tuple(
            DrawnVotesConfig.of(reward) if isinstance(reward, VotesConfig) else reward
            for reward in config.rewards
        ),
        faults=dataclasses.replace(config.faults, hacking="warn"),
        sinks=(),
    )


def _explained(error: CustomizedGRPOError, config: RunConfig) -> str:
    """The message without the way to go on, which there is not, but with the way to more memory."""
    text = str(error).split("; `cgrpo resume", 1)[0]
    if error.__cause__ is None or not is_out_of_memory(error.__cause__):
        return text
    try:
        work, machine = predict(config), look()
    except ConfigError:  # it cannot be counted
        return text
    limit = _AFTER_FAILURE * machine.place(config.device).total
    return f"{text}; first of all: {what_to_lower(work, machine, limit)}"


def _measured(rows: Sequence[Row], inner_updates: int, device: torch.device) -> Measured:
    last = [row for row in rows if row["update"]][-inner_updates:]
    stages = [
        value
        for row in last
        for name, value in row.items()
        if name.startswith("seconds/") and name not in _RARE
    ]
    fitted = [row["micro_batch_size"] for row in rows if row.get("micro_batch_size")]
    return Measured(
        seconds=sum(stages) / inner_updates,
        validation=rows[-1].get("seconds/validation", 0.0),
        peak=_peak(device),
        micro_batch_size=int(fitted[-1]) if fitted else None,
    )


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _report(config: RunConfig, measured: Measured, price: float | None) -> list[str]:
    machine = look()
    place = machine.place(config.device)
    work, predicted = _predicted(config, place.name if place.is_gpu else "cpu")
    table = _table(measured, work, predicted)
    lines = [
        f"on {place.name if place.is_gpu else 'the CPU'}, in the second of {_ROLLOUTS} rollouts:",
        *table.aligned().splitlines(),
        *["memory: measured with Python and its libraries, estimated without"] * (not place.is_gpu),
        _whole_run(config, measured, price, is_paid=place.is_gpu),
    ]
    if measured.micro_batch_size is not None:
        lines.append(
            f"memory ran out, and {measured.micro_batch_size} pairs at once fitted: write "
            f"--train.micro_batch_size {measured.micro_batch_size}"
        )
    if measured.peak <= TIGHT * place.total:
        return [*lines, f"it fits: {place.name} has {place.total / 1e9:.1f} GB"]
    lines.append(f"it is tight: {place.name} has {place.total / 1e9:.1f} GB")
    if work is not None and predicted is not None:
        own = predicted.memory[predicted.layout].total
        limit = TIGHT * place.total * own / measured.peak
        lines.append(f"lower first: {what_to_lower(work, machine, limit)}")
    return lines


def _copying(config: RunConfig, rows: Sequence[Row], schedule: dict[str, Any]) -> list[str]:
    """Whether the rewards pay for copies, where the copy gap is known and the samples can tell.

    The correlations of few samples are rough, their quotient rougher: it is a warning.
    """
    pays = [
        [row[key] for row in rows if (key := f"copying_pays/{name}") in row]
        for name in ("identity", "prompt")
    ]
    if not all(pays):
        return []
    identity, prompt = map(fmean, pays)
    rollout = config.rollout
    samples = _ROLLOUTS * rollout.prompts_per_rollout * rollout.group_size
    if identity < 2 / math.sqrt(samples):
        return []
    weights = (dict(zip(schedule["objectives"], row, strict=True)) for row in schedule["weights"])
    highest = max(row["prompt"] / (row["prompt"] + row["identity"]) for row in weights)
    neutral = identity / (identity - prompt) if prompt < 0 else 1.0
    if highest >= neutral:
        return []
    return [
        f"copies are rewarded: with the copy gap identity rises (correlation {identity:+.2f}) and "
        f"the prompt hardly falls ({prompt:+.2f}), so that a weighted sum punishes copies from a "
        f"prompt weight of about {neutral:.2f} on, and the highest is {highest:.2f}; raise "
        "advantage.schedule.high, or reward the subject's region alone, with copy_penalty"
    ]


def _predicted(config: RunConfig, name: str) -> tuple[Workload | None, Estimate | None]:
    """None of what is not known: a generator that is not counted, or a device."""
    try:
        work = predict(config)
    except ConfigError:
        return None, None
    device = find_device("cpu") if name == "cpu" else device_called(name)
    if device is None:
        return work, None
    processes = read_number("WORLD_SIZE", 1)
    mfu = assumed_mfu(config, device)
    cluster = Cluster(
        device=device,
        num_devices=processes,
        fsdp=config.fsdp,
        rollout_mfu=mfu,
        update_mfu=mfu,
    )
    return work, estimate(work, cluster)


def _table(measured: Measured, work: Workload | None, predicted: Estimate | None) -> Table:
    seconds = memory = "?"
    if predicted is not None:
        seconds = f"{predicted.seconds_per_update:.3g}"
        memory = f"{predicted.memory[predicted.layout].total / 1e9:.1f}"
    rows = [
        ["seconds per update", f"{measured.seconds:.3g}", seconds],
        ["peak memory, GB", f"{measured.peak / 1e9:.1f}", memory],
    ]
    if measured.validation:
        rows.append(["seconds per validation", f"{measured.validation:.3g}", ""])
    return Table(heads=["", "measured", "estimated"], rows=rows)


def _whole_run(
    config: RunConfig, measured: Measured, price: float | None, *, is_paid: bool = True
) -> str:
    updates, every = config.train.num_updates, config.evaluation.validate_every
    validations = num_validations(updates, every)
    hours = (updates * measured.seconds + validations * measured.validation) / 3600
    processes = read_number("WORLD_SIZE", 1)
    cost = "; --price gives the cost" * is_paid
    if price is not None:
        cost = f", {hours * processes * price:.2f} at {price:g} an hour for each device"
    return (
        f"the whole run: {updates} updates, {validations} validations, {duration(3600 * hours)} on "
        f"{processes} {'device' if processes == 1 else 'devices'}{cost}"
    )
