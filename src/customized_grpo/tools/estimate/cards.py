"""Which card a run is for, and what an hour of one costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from customized_grpo.tools.estimate.cost import TIGHT, Cluster, estimate, predict_memory
from customized_grpo.tools.estimate.devices import CPU, DEVICES, Device, device_called, find_device
from customized_grpo.tools.estimate.workload import Workload

_USUAL = ("rtx4090", "l40s", "h100", "h200", "b200")  # one for each size of memory


@dataclass(frozen=True, slots=True)
class Rent:
    """What somebody asked for an hour of one card, on demand; dollars."""

    price: float
    who: str
    when: str
    """Year and month: prices change, and differ by a factor of four between providers."""


# From public price lists, as others had transcribed them.
RENTS = {
    "rtx3090": Rent(0.22, "RunPod", "2026-03"),
    "rtx4090": Rent(0.34, "RunPod", "2026-03"),
    "rtx5090": Rent(0.69, "RunPod", "2026-03"),
    "l4": Rent(0.44, "RunPod", "2026-03"),
    "a6000": Rent(0.82, "Verda", "2026-10"),
    "l40s": Rent(0.79, "RunPod", "2026-03"),
    "a100-40gb": Rent(1.99, "Lambda", "2026-11"),
    "a100-80gb": Rent(1.39, "RunPod", "2026-11"),
    "h100": Rent(2.69, "RunPod", "2026-11"),
    "h200": Rent(4.59, "RunPod", "2026-10"),
    "b200": Rent(6.79, "RunPod", "2026-10"),
}


def card_for(work: Workload, num_devices: int) -> Device:
    """The device that a run is for: the CPU, this machine's GPU, or the smallest usual card."""
    generator: Any = work.config.generator
    if work.config.device == CPU:
        return find_device(CPU)
    if torch.cuda.is_available():
        own = device_called(torch.cuda.get_device_name())
        if own is not None:
            return own
    if generator.path.startswith("embedded:"):
        return find_device(CPU)
    usual = [DEVICES[name] for name in _USUAL]
    memory = _memory(work, num_devices)
    return next((card for card in usual if memory <= card.memory), usual[-1])


def _memory(work: Workload, num_devices: int = 1) -> float:
    """Bytes that the run, as it is configured, is predicted to take on each device."""
    config = work.config
    generator: Any = config.generator
    checkpointing = generator.gradient_checkpointing
    return predict_memory(work, num_devices, fsdp=config.fsdp, checkpointing=checkpointing).total


def price_list(works: dict[str, Workload]) -> Iterator[str]:
    """Rows of a Markdown table: hours and dollars of each run on one of each card."""
    yield f"| | {' | '.join(works)} |"
    yield f"|---|{'---|' * len(works)}"
    for card in DEVICES.values():
        cells = " | ".join(hours_and_dollars(work, card) for work in works.values())
        yield f"| {card_label(card)} | {cells} |"


def card_label(card: Device) -> str:
    """Name, memory and price of a card."""
    rent = RENTS.get(card.name)
    price = f", ${rent.price:.2f} ({rent.who}, {rent.when})" if rent else ""
    return f"`{card.name}`, {card.sold_as} GB{price}"


def hours_and_dollars(work: Workload, card: Device) -> str:
    """Of a whole run, such as '4.9 h, $1.7'; '~' before it where memory is tight, a dash where it
    does not fit."""
    memory = _memory(work)
    if memory > card.memory:
        return "-"
    hours, rent = estimate(work, Cluster(device=card)).hours, RENTS.get(card.name)
    tight = "~ " * (memory > TIGHT * card.memory)
    return f"{tight}{_short(hours)} h" + (f", ${_short(hours * rent.price)}" if rent else "")


def _short(number: float) -> str:
    """Two digits: no more is known. 131 is 130."""
    return f"{float(f'{number:.2g}'):g}"
