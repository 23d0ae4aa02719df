"""What `benchmarks/gpu.py` has found as the Markdown tables of docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_MISSING = "-"
_GROUP, _STEPS, _TRAINED = 12, 25, 5  # what is measured unless the result says otherwise
_WAYS = {
    "batch 1, a backward per pair": ("naive", None),
    "attention: PyTorch's choice": ("attention", "native"),
    "attention: cuDNN": ("attention", "_native_cudnn"),
    "attention: PyTorch's FlashAttention 2": ("attention", "_native_flash"),
    "attention: memory-efficient": ("attention", "_native_efficient"),
    "attention: flash-attn": ("attention", "flash"),
    "attention: FlashAttention 3": ("attention", "_flash_3"),
    "checkpointing, 1 pair per backward": ("layouts", "with checkpointing, 1 per backward"),
    "checkpointing, 4 pairs": ("layouts", "with checkpointing, 4 per backward"),
    "checkpointing, 12 pairs": ("layouts", "with checkpointing, 12 per backward"),
    "no checkpointing, 1 pair": ("layouts", "without checkpointing, 1 per backward"),
    "no checkpointing, 2 pairs": ("layouts", "without checkpointing, 2 per backward"),
    "no checkpointing, 3 pairs": ("layouts", "without checkpointing, 3 per backward"),
    "no checkpointing, 6 pairs": ("layouts", "without checkpointing, 6 per backward"),
    "FSDP on one process": ("fsdp", None),
    "`compile: true`": ("compile", None),
}


def show(result: dict[str, Any]) -> str:
    """The tables, of what was measured: a table or row of which nothing is known is left out."""
    tables = (_known(tuple(part(result))) for part in (_stages, _ways, _machine))
    return "\n\n".join(filter(None, tables))


def _known(table: Sequence[str]) -> str:
    head, rows = table[:2], table[2:]
    known = [row for row in rows if set(row.strip("| ").split(" | ")[1:]) - {_MISSING, ""}]
    return "\n".join([*head, *known]) if known else ""


def _stages(result: dict[str, Any]) -> Iterator[str]:
    rollout, part = result.get("rollout", {}), _part(result, "iteration")
    images = rollout.get("group_size", _GROUP)
    steps = rollout.get("num_steps", _STEPS)
    planned = images * rollout.get("num_trained_steps", _TRAINED)
    pairs = part.get("trained_pairs", planned)
    stages, slow = part.get("stages", {}), _naive_seconds(result, images, steps, pairs)
    rows = {
        "encoding of a prompt and its reference": ("data", part.get("encode"), "encode"),
        f"rollout: {images} images x {steps} steps, decoding": (
            "rollout", stages.get("rollout"), ("rollout", "decode"),
        ),
        "decoding alone": ("decode", part.get("decode"), "decode"),
        f"rewards of {images} images": ("reward", part.get("reward"), "reward"),
        f"update: {pairs} pairs": ("update", stages.get("update"), "update"),
    }  # fmt: skip
    yield "| stage | seconds | MFU | GB at most | naive structure, seconds |"
    yield "|---|---|---|---|---|"
    for label, (name, numbers, counted) in rows.items():
        seconds = numbers and numbers["seconds"]
        flops = _useful(result, counted)
        flops = flops and flops * (pairs / planned if name == "update" else 1)
        cells = (_number(seconds, "{:.2f}"), _share(result, flops, seconds))
        naive = _number(slow.get(name), "{:.2f}") if name in ("rollout", "reward", "update") else ""
        yield f"| {label} | {' | '.join(cells)} | {_gigabytes(numbers)} | {naive} |"


def _naive_seconds(
    result: dict[str, Any], images: int, steps: int, pairs: int
) -> dict[str, float | None]:
    """The same work at the rates of the naive structure."""
    rates = _part(result, "naive")
    if "reward" not in rates:
        return {}
    decoding = rates["decode"]["seconds"] * images
    return {
        "rollout": rates["forward_seconds"] * images * steps + decoding,
        "reward": rates["reward"]["seconds"] * images,
        "update": rates["pair_seconds"] * pairs,
    }


def _ways(result: dict[str, Any]) -> Iterator[str]:
    predicted = result.get("predicted", {})
    yield "| | s per sample and step | MFU | s per trained pair | MFU | GB at most |"
    yield "|---|---|---|---|---|---|"
    for label, (part, key) in _WAYS.items():
        found = _part(result, part)
        found = found.get(key, {}) if key else found
        if "error" in found and "pair_seconds" not in found and found["error"] != "":
            yield f"| {label} | did not run | | | | |"
            continue
        fitted = found.get("micro_batch_size")
        asked = key and key.split(", ")[-1].split()[0]
        note = f" (fitted: {fitted})" if key and key[-8:] == "backward" and fitted and (
            str(fitted) != asked
        ) else ""  # fmt: skip
        forward, pair = found.get("forward_seconds"), found.get("pair_seconds")
        cells = (
            _number(forward, "{:.4f}"),
            _share(result, predicted.get("forward_flops"), forward),
            _number(pair, "{:.3f}"),
            _share(result, predicted.get("pair_flops"), pair),
            _gigabytes(found),
        )
        yield f"| {label}{note} | {' | '.join(cells)} |"


def _machine(result: dict[str, Any]) -> Iterator[str]:
    environment, part = result.get("environment", {}), _part(result, "iteration")
    peak = _part(result, "peak").get("bf16_flops_per_second")
    memory = result.get("predicted", {}).get("memory", {}).get("True", {})
    found = [s["bytes"] for s in part.get("stages", {}).values() if s.get("bytes")]
    embedded = _part(result, "embedded")
    yield "| | |"
    yield "|---|---|"
    yield f"| device | {environment.get('device', _MISSING)} |"
    versions = " / ".join(environment[n] for n in ("torch", "diffusers") if n in environment)
    yield f"| PyTorch / diffusers | {versions or _MISSING} |"
    yield f"| bfloat16 matrix products, TFLOP/s | {_number(peak and peak / 1e12, '{:.0f}')} |"
    yield f"| memory at most, GB | {_gigabytes({'bytes': max(found)} if found else None)} |"
    predicted = memory.get("total")
    yield f"| as `cgrpo estimate` predicts | {_number(predicted and predicted / 1e9, '{:.1f}')} |"
    yield (
        "| `configs/emoji.yaml`, seconds per update | "
        f"{_number(embedded.get('seconds_per_update'), '{:.2f}')} |"
    )


def _part(result: dict[str, Any], name: str) -> dict[str, Any]:
    return result.get("parts", {}).get(name, {})


def _useful(result: dict[str, Any], stages: str | Sequence[str]) -> float | None:
    flops = result.get("predicted", {}).get("useful", {})
    names = (stages,) if isinstance(stages, str) else stages
    return sum(flops[name] for name in names) if flops else None


def _share(result: dict[str, Any], flops: float | None, seconds: float | None) -> str:
    peak = _part(result, "peak").get("bf16_flops_per_second")
    return _number(flops / seconds / peak if flops and seconds and peak else None, "{:.0%}")


def _gigabytes(numbers: dict[str, Any] | None) -> str:
    size = (numbers or {}).get("bytes")
    return _number(size and size / 1e9, "{:.1f}")


def _number(value: float | None, form: str) -> str:
    return form.format(value) if value else _MISSING
