"""Does a run fit into the memory that is there? If not, which fields make it fit?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from customized_grpo.assets import one_line
from customized_grpo.config import RunConfig
from customized_grpo.errors import ConfigError
from customized_grpo.runs.progress import duration
from customized_grpo.tools.doctor.findings import Finding, from_error, gigabytes
from customized_grpo.tools.doctor.machine import Machine
from customized_grpo.tools.estimate.cost import (
    TIGHT,
    Cluster,
    Memory,
    assumed_mfu,
    estimate,
    loading_ram,
    predict_memory,
)
from customized_grpo.tools.estimate.devices import CPU, find_device
from customized_grpo.tools.estimate.workload import Workload, count_run

_LONG = 24.0  # hours
_REST = (
    "no field makes enough room: take a GPU with more memory, smaller generator.height and width, "
    "or serve the rewards elsewhere (docs/remote_rewards.md)"
)

Changes = dict[str, Any]
"""Field -> value."""


def predict(config: RunConfig) -> Workload:
    """Counts the run, which takes seconds, or a ConfigError where that is not possible."""
    with one_line("generator: cannot be counted"):
        return count_run(config)


def memory(check: str, work: Workload, machine: Machine) -> Finding:
    """Predicted memory against what is there."""
    place, used = machine.place(work.config.device), _predicted(work, machine)
    sizes = sorted(dataclasses.asdict(used).items(), key=lambda item: -item[1])
    largest = ", ".join(f"{name} {gigabytes(size)}" for name, size in sizes[:3])
    found = f"{gigabytes(used.total)} predicted ({largest}), {place.name} has "
    found += f"{gigabytes(place.total)}, {gigabytes(place.free)} free{_processes(work, machine)}"
    found += f", counted as {work.stand_in}" * bool(work.stand_in)
    room = TIGHT * place.total
    if used.total <= min(room, place.free):
        return Finding(check=check, status="ok", found=found)
    if used.total > place.total:
        fix = what_to_lower(work, machine, room)
        return Finding(check=check, status="problem", found=found, fix=fix)
    others = "end what else uses it, or " if used.total > place.free else ""
    fix = others + what_to_lower(work, machine, min(room, place.free))
    return Finding(check=check, status="warning", found=f"{found}: tight", fix=fix)


def loading(work: Workload, machine: Machine) -> Finding:
    """The RAM through which weights go to a GPU, against what is there."""
    needed, ram = loading_ram(work) * _num_devices(work, machine), machine.ram
    found = f"up to {gigabytes(needed)} for loading, RAM has {gigabytes(ram.total)}"
    if needed <= ram.total:
        return Finding(check="ram for loading", status="ok", found=found)
    fix = "take a machine with more, or add swap: each weight is read once"
    return Finding(check="ram for loading", status="warning", found=found, fix=fix)


def time_on_cpu(work: Workload) -> Finding:
    """How long the run takes where no GPU does it."""
    cpu = find_device(CPU)
    mfu = assumed_mfu(work.config, cpu)
    hours = estimate(work, Cluster(device=cpu, rollout_mfu=mfu, update_mfu=mfu)).hours
    found = f"no GPU does the work: about {duration(3600 * hours)} on this CPU"
    if hours < _LONG:
        return Finding(check="time", status="ok", found=found)
    fix = "rent a GPU, for which `cgrpo estimate CONFIG` has hours and a price (docs/rented_gpu.md)"
    return Finding(check="time", status="warning", found=found, fix=fix)


def what_fits(name: str, config: RunConfig, machine: Machine) -> Finding:
    """``memory`` of a packaged config, as a hint: one that does not fit is no fault."""
    try:
        found = memory(name, predict(config), machine)
    except ConfigError as error:
        found = from_error(name, error)
    return dataclasses.replace(found, status="ok" if found.status == "ok" else "warning")


def _num_devices(work: Workload, machine: Machine) -> int:
    """Processes: FSDP has all GPUs, a run without it fits on many if it fits on one."""
    sharded = work.config.fsdp and machine.place(work.config.device).is_gpu
    return len(machine.gpus) if sharded else 1


def _predicted(work: Workload, machine: Machine) -> Memory:
    config, count = work.config, _num_devices(work, machine)
    generator: Any = config.generator
    checkpointing = generator.gradient_checkpointing
    return predict_memory(work, count, fsdp=config.fsdp, checkpointing=checkpointing)


def _processes(work: Workload, machine: Machine) -> str:
    count = _num_devices(work, machine)
    return f", each of {count} by `torchrun --nproc_per_node {count}`" if count > 1 else ""


def what_to_lower(work: Workload, machine: Machine, limit: float) -> str:
    """Flags that bring the memory below a limit, none of them superfluous."""

    def fits(changes: Changes) -> bool:
        return _predicted(_changed(work, changes), machine).total <= limit

    changes: Changes = {}
    for step in _steps(work, machine):
        changes |= step
        if fits(changes):
            for field in tuple(changes):
                fewer = {name: value for name, value in changes.items() if name != field}
                changes = fewer if fits(fewer) else changes
            changed = _changed(work, changes)
            flags = " ".join(f"--{name} {str(value).lower()}" for name, value in changes.items())
            size = gigabytes(_predicted(changed, machine).total)
            return f"{flags} ({size} predicted{_processes(changed, machine)})"
    return _REST


def _steps(work: Workload, machine: Machine) -> Iterator[Changes]:
    """From what costs least time to what costs most; each comes on top of those before."""
    config, on_gpu = work.config, machine.place(work.config.device).is_gpu
    generator: Any = config.generator
    passes = config.rollout.batch_size or work.samples
    pairs = work.pairs // config.train.inner_updates
    micro = config.train.micro_batch_size or pairs
    while max(passes, micro) > 1:
        passes, micro = -(-passes // 2), -(-micro // 2)
        yield {"train.micro_batch_size": micro, "rollout.batch_size": passes}
    for name in ("gradient_checkpointing", *(["offload"] if on_gpu else [])):
        if not getattr(generator, name):
            yield {f"generator.{name}": True}
    if generator.quantization is not None or config.fsdp:  # they exclude each other
        return
    can_shard = not config.compile and config.train.optimizer == "adamw"
    if on_gpu and len(machine.gpus) > 1 and can_shard:
        yield {"fsdp": True}
    elif config.lora is not None and all(c.kind != "lora" for c in generator.checkpoints()):
        yield {"generator.quantization": "int8"}
        if on_gpu:
            yield {"generator.quantization": "nf4"}


def _changed(work: Workload, changes: Changes) -> Workload:
    config = work.config
    for path, value in changes.items():
        section, _, field = path.rpartition(".")
        if section:
            field, value = section, dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{field: value})
    return dataclasses.replace(work, config=config)
