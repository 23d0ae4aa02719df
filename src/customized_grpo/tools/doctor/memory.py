"""Does a run fit into the memory that is there? If not, which fields make it fit?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from customized_grpo.assets import one_line
from customized_grpo.config import RunConfig
from customized_grpo.errors import ConfigError
from customized_grpo.tools.doctor.findings import (
    Finding,
    from_error,
    gigabytes,
    ok,
    problem,
    warning,
)
from customized_grpo.tools.doctor.machine import Machine, Place, process_cores
from customized_grpo.tools.estimate.cost import Cluster, Estimate, Memory, estimate
from customized_grpo.tools.estimate.devices import DEVICES
from customized_grpo.tools.estimate.workload import Workload, count_run

_TIGHT = 0.9  # of the memory: the prediction leaves out fragmentation and kernels' workspaces
_LONG = 72  # hours on a CPU
_REST = (
    "no field makes enough room: take a GPU with more memory, smaller generator.height and width, "
    "or serve the rewards elsewhere (docs/remote_rewards.md)"
)

Changes = dict[str, Any]
"""Field -> value."""


def predict(config: RunConfig) -> Workload:
    """Counts the run, which takes seconds.

    Raises:
        ConfigError: if it cannot be counted.
    """
    with one_line("generator: cannot be counted"):
        return count_run(config)


def memory(check: str, work: Workload, machine: Machine) -> Finding:
    """Predicted memory against what is there."""
    fit = _Fit(work=work, machine=machine)
    used = fit.memory({})
    found = f"{gigabytes(used.total)} predicted ({_parts(used)}), {fit.place.name} has "
    found += f"{gigabytes(fit.place.total)}, {gigabytes(fit.place.free)} free{fit.processes({})}"
    room, free = _TIGHT * fit.place.total, fit.place.free
    if used.total > fit.place.total:
        return problem(check, found, fit.advice(room, fit.place.total))
    if used.total > min(room, free):
        others = "end what else uses it, or " if used.total > free else ""
        return warning(check, f"{found}: tight", others + fit.advice(min(room, free)))
    hours = fit.hours()
    if not fit.place.is_gpu and hours > _LONG:
        fix = "take a machine with a GPU (time: `cgrpo estimate CONFIG`)"
        return warning(check, f"{found}, but about {hours / 24:,.0f} days on this CPU", fix)
    return ok(check, found)


def what_fits(name: str, config: RunConfig, machine: Machine) -> Finding:
    """``memory`` of a packaged config, as a hint: one that does not fit is no fault."""
    try:
        found = memory(name, predict(config), machine)
    except ConfigError as error:
        found = from_error(name, error)
    return dataclasses.replace(found, status="ok" if found.status == "ok" else "warning")


def _parts(used: Memory) -> str:
    """The largest ones."""
    sizes = {field.name: getattr(used, field.name) for field in dataclasses.fields(used)}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    return ", ".join(f"{name} {sizes[name] / 1e9:.1f}" for name in largest)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fit:
    """A run on a machine, as its config says or with some changes."""

    work: Workload
    machine: Machine

    @property
    def config(self) -> RunConfig:
        return self.work.config

    @property
    def place(self) -> Place:
        return self.machine.place(self.config.device)

    def count(self, changes: Changes) -> int:
        """Processes: FSDP has all GPUs, a run without it fits on many if it fits on one."""
        sharded = changes.get("fsdp", self.config.fsdp) and self.place.is_gpu
        return len(self.machine.gpus) if sharded else 1

    def processes(self, changes: Changes) -> str:
        count = self.count(changes)
        return f", each of {count} by `torchrun --nproc_per_node {count}`" if count > 1 else ""

    def estimate(self, changes: Changes) -> Estimate:
        config = _changed(self.config, changes)
        cores = process_cores()
        cpu = DEVICES["cpu"]  # one core; of no matter for the memory
        device = dataclasses.replace(cpu, bf16=cores * cpu.bf16, float32=cores * cpu.float32)
        cluster = Cluster(device=device, num_devices=self.count(changes), fsdp=config.fsdp)
        return estimate(dataclasses.replace(self.work, config=config), cluster)

    def memory(self, changes: Changes) -> Memory:
        result = self.estimate(changes)
        return result.memory[result.layout]

    def hours(self) -> float:
        return self.estimate({}).hours

    def advice(self, *limits: float) -> str:
        """Flags that bring it below the first of the limits that can be reached."""
        for limit in limits:
            for changes in self._candidates():
                if self.memory(changes).total <= limit:
                    return self._flags(self._needed(changes, limit))
        return _REST

    def _needed(self, changes: Changes, limit: float) -> Changes:
        """Without those that the others make superfluous."""
        for field in tuple(changes):
            fewer = {name: value for name, value in changes.items() if name != field}
            changes = fewer if self.memory(fewer).total <= limit else changes
        return changes

    def _flags(self, changes: Changes) -> str:
        flags = " ".join(f"--{name} {str(value).lower()}" for name, value in changes.items())
        size = gigabytes(self.memory(changes).total)
        return f"{flags} ({size} predicted{self.processes(changes)})"

    def _candidates(self) -> Iterator[Changes]:
        """From what costs least time to what costs most: smaller batches, then more and more."""
        for ladder in self._ladders():
            for length in range(len(ladder) + 1):
                steps = dict(ladder[:length])
                yield from ({**batches, **steps} for batches in self._batches())

    def _batches(self) -> Iterator[Changes]:
        """As they are, then halved and halved again."""
        config, images = self.config, self.work.samples
        passes = config.rollout.batch_size or images
        pairs = images // config.train.inner_updates * config.rollout.num_trained_steps
        micro = config.train.micro_batch_size or pairs
        yield {}
        for power in range(1, math.ceil(math.log2(max(passes, micro))) + 1):
            yield {
                "train.micro_batch_size": max(1, micro >> power),
                "rollout.batch_size": max(1, passes >> power),
            }

    def _ladders(self) -> list[list[tuple[str, Any]]]:
        """Fields in the order in which they are tried; quantization and FSDP exclude each other."""
        config, on_gpu = self.config, self.place.is_gpu
        generator: Any = config.generator
        fields = ["gradient_checkpointing", *(["offload"] if on_gpu else [])]
        steps = [(f"generator.{name}", True) for name in fields if not getattr(generator, name)]
        if generator.quantization is not None or config.fsdp:
            return [steps]
        ladders: list[list[tuple[str, Any]]] = []
        can_shard = not config.compile and config.train.optimizer == "adamw"
        if on_gpu and len(self.machine.gpus) > 1 and can_shard:
            ladders.append([*steps, ("fsdp", True)])
        if config.lora is not None and not getattr(generator, "uno_lora", None):
            kinds = ("int8", "nf4") if on_gpu else ("int8",)
            ladders.append([*steps, *(("generator.quantization", kind) for kind in kinds)])
        return ladders or [steps]


def _changed(config: RunConfig, changes: Changes) -> RunConfig:
    for path, value in changes.items():
        section, _, field = path.rpartition(".")
        if section:
            field, value = section, dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{field: value})
    return config
