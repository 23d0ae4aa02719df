"""An estimate as tables on the terminal."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

from rich.console import Console
from rich.table import Table

from customized_grpo.tools.estimate.cost import Cluster, Estimate, Memory
from customized_grpo.tools.estimate.workload import Workload


def show(
    work: Workload, cluster: Cluster, result: Estimate, price: float | None, console: Console
) -> None:
    """Prints what was counted, the time of an iteration, the memory and the run's cost."""
    console.print(_counted(work), soft_wrap=True)
    console.print(_times(result))
    console.print(_memory_table(cluster, result))
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
    }
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
    return (
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


def _memory_table(cluster: Cluster, result: Estimate) -> Table:
    room = cluster.device.memory
    is_one = cluster.num_devices == 1
    shown = {n: m for n, m in result.memory.items() if not (is_one and n.startswith("fsdp"))}
    title = f"memory (* = this run; {cluster.device.name} has {room / 1e9:.0f})"
    table = Table("GB per device", title=title)
    for name in shown:
        table.add_column(f"{name}{' *' if name == result.layout else ''}", justify="right")
    for field in fields(Memory):
        table.add_row(
            field.name, *(f"{getattr(memory, field.name) / 1e9:.1f}" for memory in shown.values())
        )
    table.add_section()
    totals = (memory.total for memory in shown.values())
    table.add_row("total", *(f"{total / 1e9:.1f}{' !' * (total > room)}" for total in totals))
    return table


def _run(work: Workload, cluster: Cluster, result: Estimate, price: float | None) -> str:
    train = work.config.train
    cost = "; --price gives the cost" if price is None else (
        f", {result.device_hours * price:,.2f} at {price:g} each"
    )  # fmt: skip
    lines = [
        f"update: {result.seconds_per_update:,.3g} s; {result.images_per_second:,.3g} images / s.",
        f"run: {train.num_updates} updates = {result.hours:,.3g} h on {cluster.num_devices} x "
        f"{cluster.device.name} = {result.device_hours:,.4g} device hours{cost}.",
        f"assumed: MFU {cluster.rollout_mfu:.0%} (rollout), {cluster.update_mfu:.0%} (update); "
        "evaluation, checkpoints and loading not counted.",
    ]
    if result.memory[result.layout].total > cluster.device.memory:
        lines.append("! does not fit (see docs/generators.md, Memory).")
    if work.rewards.unknown:
        lines.append(f"! not counted: {', '.join(work.rewards.unknown)}.")
    return "\n".join(lines)


def _si(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} "
