"""How do seconds grow with G, T, K, resolution, LoRA rank and references, and is that predicted?

    python benchmarks/scaling.py --json

From a small reference point (the embedded generator) one number at a time is changed. At the
reference point the prediction of every stage is set to what was measured; elsewhere it is the
counts alone that predict. 1 = as predicted, above 1 = faster than predicted.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from _iterations import STAGES, measure, parse, plan

REFERENCE = [
    "--rollout.group_size=8",
    "--rollout.num_steps=6",
    "--rollout.num_trained_steps=3",
    "--rollout.prompts_per_rollout=2",
    "--train.inner_updates=1",
    "--lora.rank=32",
]
CURVES: dict[str, tuple[int, ...]] = {
    "group_size": (4, 8, 16, 32),
    "num_steps": (4, 6, 12, 24),
    "num_trained_steps": (1, 3, 5),
    "resolution": (64, 96, 128),
    "lora_rank": (8, 32, 128),
    "references": (1, 2, 4),
}
Point: TypeAlias = tuple[dict[str, float], dict[str, float]]
"""Seconds and useful FLOPs of the stages."""


def main() -> None:
    """Measures and prints."""
    options = parse(
        __doc__ or "",
        ("--repeats", {"type": int, "default": 5, "help": "iterations a point (default: 5)"}),
        ("--curves", {"nargs": "+", "choices": CURVES, "default": list(CURVES)}),
        ("--points", {"type": int, "default": 9, "help": "of each curve, at most"}),
    )
    import torch

    torch.set_num_threads(options.threads)
    result = {}
    print(f"{'':18}{'':>5}" + "".join(f"{stage:>11}" for stage in ("rollout", "update", "all")))
    for curve in options.curves:
        base = measured_and_counted(options.config, curve, None, options.repeats)
        result[curve] = {}
        for value in CURVES[curve][: options.points]:
            point = measured_and_counted(options.config, curve, value, options.repeats)
            result[curve][value] = ratios = compare(point, base)
            print(f"{curve:18}{value:5}" + "".join(f"{ratio:11.2f}" for ratio in ratios.values()))
    if options.json:
        print(json.dumps({"predicted_over_measured": result, "threads": options.threads}))


def measured_and_counted(path: Path, curve: str, value: int | None, repeats: int) -> Point:
    """Seconds and useful FLOPs of the stages at a point of a curve; None = the reference point."""
    from customized_grpo.config import load_config
    from customized_grpo.tools.estimate.workload import count_run

    config = load_config(path, REFERENCE + flags(curve, value))
    if curve == "references":  # FLUX.1 Kontext takes one; UNO's scheme takes several
        config = with_references(config, value or 1)
    references = value if curve == "references" and value else 1
    return measure(config, repeats), plan(count_run(config, references))


def flags(curve: str, value: int | None) -> list[str]:
    """Overrides of a config that bring it to a point."""
    if value is None or curve == "references":
        return []
    if curve == "resolution":
        return [f"--generator.height={value}", f"--generator.width={value}"]
    return [f"--{'lora.rank' if curve == 'lora_rank' else f'rollout.{curve}'}={value}"]


def with_references(config, count: int):
    """The run with the embedded generator's weights under UNO's scheme."""
    from _references import CopiedReferences

    from customized_grpo.generators.uno import UnoConfig

    generator = UnoConfig(path=config.generator.path, reference_long_side=64)
    return replace(config, generator=generator, data=CopiedReferences(references=count))


def compare(
    point: tuple[dict[str, float], dict[str, float]],
    base: tuple[dict[str, float], dict[str, float]],
) -> dict[str, float]:
    """Predicted / measured seconds, relative to the base."""
    (seconds, flops), (base_seconds, base_flops) = point, base
    predicted = {s: base_seconds[s] * flops[s] / base_flops[s] for s in STAGES}
    ratios = {stage: predicted[stage] / seconds[stage] for stage in ("rollout", "update")}
    return {**ratios, "all": sum(predicted.values()) / seconds["iteration"]}


if __name__ == "__main__":
    main()
