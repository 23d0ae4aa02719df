"""An estimate as tables on the terminal."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from customized_grpo.tools.estimate.cards import RENTS
from customized_grpo.tools.estimate.cost import TIGHT, Cluster, Estimate, Memory
from customized_grpo.tools.estimate.devices import Device
from customized_grpo.tools.estimate.judges import count_judges
from customized_grpo.tools.estimate.votes import count_votes
from customized_grpo.tools.estimate.workload import Workload


def show(
    work: Workload, cluster: Cluster, result: Estimate, price: float | None, console: Console
) -> None:
    """Prints what was counted, the time of an iteration, the memory and the run's cost."""
    console.print(_counted(work), soft_wrap=True)
    console.print(_times(result))
    console.print(_memory_table(work, cluster, result))
    console.print(_run(work, cluster, result, price), soft_wrap=True)


def as_json(work: Workload, cluster: Cluster, result: Estimate, price: float | None) -> str:
    """One line with everything, in FLOPs, bytes, seconds and hours."""
    counts = {
        "transformer": asdict(work.transformer),
        "samples": work.samples,
        "velocities": work.velocities,
        "pairs": work.pairs,
        "guidance_passes": work.guidance_passes,
        "not_counted": work.rewards.unknown,
        "stand_in": work.stand_in,
        "judges": [asdict(judge) for judge in count_judges(work)],
        "votes": [asdict(votes) for votes in count_votes(work.config)],
    }
    if price is None and cluster.device.name in RENTS:
        price = RENTS[cluster.device.name].price
    return json.dumps(
        {
            "cluster": asdict(cluster),
            "counts": counts,
            **asdict(result),
            "memory": {name: {**asdict(m), "total": m.total} for name, m in result.memory.items()},
            "cost": None if price is None else result.device_hours * price,
        }
    )


def _counted(work: Workload) -> str:
    model, rollout = work.transformer, work.config.rollout
    counted_as = f"counted as {work.stand_in}: the config's path has none to read.\n"
    return counted_as * bool(work.stand_in) + (
        f"transformer: {_si(model.parameters)} parameters, {_si(model.trained)} trained; a sample "
        f"is {work.tokens.image} image and {work.tokens.text} text tokens.\n"
        f"iteration: {rollout.prompts_per_rollout} prompts x {rollout.group_size} = {work.samples} "
        f"images, {work.velocities} denoising steps of {_si(model.forward_flops)}FLOP, "
        f"{work.pairs} trained pairs of {_si(model.pair_flops)}FLOP"
        + (f", each pass {work.guidance_passes} times (guidance)" * (work.guidance_passes > 1))
        + ".\n"
        + _shared(work)
    )


def _shared(work: Workload) -> str:
    flops = work.transformer.prefix.forward_flops
    if not flops:
        return ""
    return (
        f"text and references: {_si(flops)}FLOP, {sum(work.prefixes):g} times in place of once for "
        f"every step and pair; that saves {work.saved:.0%} of rollout and updates.\n"
    )


def _times(result: Estimate) -> Table:
    table = Table("stage", title="one iteration (a rollout and its updates)")
    for name in ("TFLOP", "seconds", "of it waiting", "share"):
        table.add_column(name, justify="right")
    for name, stage in result.stages.items():
        share = stage.seconds / result.seconds_per_iteration
        table.add_row(
            name, f"{stage.flops / 1e12:,.4g}", f"{stage.seconds:,.3g}",
            f"{stage.communication:.2g}", f"{share:.0%}",
        )  # fmt: skip
    return table


def _memory_table(work: Workload, cluster: Cluster, result: Estimate) -> Table:
    generator: Any = work.config.generator
    room = cluster.device.memory
    is_one = cluster.num_devices == 1
    shown = {n: m for n, m in result.memory.items() if not (is_one and n.startswith("fsdp"))}
    title = f"memory (* = this run; {cluster.device.name} has {room / 1e9:.0f})"
    table = Table("GB per device", title=title)
    for name in shown:
        table.add_column(f"{name}{' *' if name == result.layout else ''}", justify="right")
    for field in fields(Memory):
        is_away = field.name == "encoders" and generator.offload
        table.add_row(
            field.name + " (offloaded)" * is_away,
            *(_gigabytes(getattr(memory, field.name)) for memory in shown.values()),
        )
    table.add_section()
    totals = (memory.total for memory in shown.values())
    table.add_row("total", *(f"{_gigabytes(total)}{' !' * (total > room)}" for total in totals))
    return table


def _gigabytes(size: float) -> str:
    """A digit behind the point, two of what is smaller: nothing that is there reads 0.0."""
    return f"{size / 1e9:.1f}" if size >= 1e8 or not size else f"{size / 1e9:.2g}"


def _run(work: Workload, cluster: Cluster, result: Estimate, price: float | None) -> str:
    train, count, device = work.config.train, cluster.num_devices, cluster.device
    in_all = f" = {result.device_hours:,.4g} device hours" if count > 1 else ""
    lines = [
        f"update: {result.seconds_per_update:,.3g} s; {result.images_per_second:,.3g} images / s.",
        f"run: {train.num_updates} updates = {result.hours:,.3g} h on {count} x {device.name}"
        f"{in_all}{_cost(device.name, result.device_hours, price)}.",
        f"RAM for loading: up to {_gigabytes(result.ram)} GB in each process.",
        *_judges(work),
        f"assumed: MFU {cluster.rollout_mfu:.0%} (rollout), {cluster.update_mfu:.0%} (update)"
        f"{_measured(device)}; evaluation, checkpoints and loading not counted.",
    ]
    memory = result.memory[result.layout].total
    if memory > device.memory:
        lines.append("! does not fit (see docs/generators.md, Memory).")
    elif memory > TIGHT * device.memory:
        lines.append(
            f"! tight: {(device.memory - memory) / 1e9:.1f} GB to spare, and fragmentation and "
            "kernels' workspaces are not counted; measure with `cgrpo train CONFIG --rehearse`."
        )
    if work.rewards.unknown:
        lines.append(f"! time not counted: {', '.join(work.rewards.unknown)}.")
    return "\n".join(lines)


def _cost(name: str, hours: float, price: float | None) -> str:
    rent = RENTS.get(name)
    if price is not None:
        return f", {hours * price:,.2f} at {price:g} a device hour"
    if rent is None:
        return "; --price gives the cost"
    cost, whose = hours * rent.price, f"{rent.who}, {rent.when}"
    return f", ${cost:,.2f} at ${rent.price:g} a device hour ({whose}; yours by --price)"


def _judges(work: Workload) -> list[str]:
    return [
        f"{judge.label}: {judge.requests:,} requests, each of about {judge.tokens:,} tokens and "
        "the answer" + ("" if judge.cost is None else f", at most {judge.cost:,.2f}") + "."
        for judge in count_judges(work)
    ] + [f"{votes}." for votes in count_votes(work.config)]


def _measured(device: Device) -> str:
    """What is known of a CPU, which no datasheet says."""
    if not device.is_cpu:
        return ""
    float32, bf16 = device.float32 / 1e9, device.bf16 / 1e9
    return f" of {float32:.0f} GFLOP/s in float32 and {bf16:.0f} in bfloat16, measured just now"


def _si(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} "
