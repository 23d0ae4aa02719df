"""The predicted scaling curves of docs/performance.md: FLUX.1 on 8 to 512 H100, as Markdown.

python benchmarks/predicted.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
REFERENCE = ["--rollout.prompts_per_rollout=64", "--train.inner_updates=2"]
NUM_DEVICES = 64
HEADER = (
    "| {} | rollout s | update s | s per update | GB, DDP | GB, FSDP |\n|---|---|---|---|---|---|"
)
CURVES: dict[str, tuple[str, Sequence[Sequence[int]]]] = {
    "G (group_size)": ("--rollout.group_size={0}", [(6,), (12,), (24,), (48,)]),
    "T (num_steps), K = 0.6 T": (
        "--rollout.num_steps={0} --rollout.num_trained_steps={1}",
        [(10, 6), (25, 15), (50, 30)],
    ),
    "K (num_trained_steps)": ("--rollout.num_trained_steps={0}", [(5,), (10,), (15,), (24,)]),
    "resolution": (
        "--generator.height={0} --generator.width={0}",
        [(256,), (512,), (768,), (1024,)],
    ),
    "LoRA rank": ("--lora.rank={0}", [(16,), (64,), (256,), (512,)]),
}


def main() -> None:
    """Prints one table per curve."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name, (flags, values) in CURVES.items():
        print(HEADER.format(name))
        for value in values:
            print(_row(str(value[0]), "flux-kontext.yaml", flags.format(*value).split()))
        print()
    print(HEADER.format("references (UNO: one at 512 px, several at 320)"))
    for count in (1, 2, 4):
        print(_row(str(count), "uno-paper.yaml", ["--lora.rank=64"], references=count))
    print()
    for line in _world_size():
        print(line)


def _row(label: str, config: str, flags: list[str], references: int = 1) -> str:
    from customized_grpo.config import load_config
    from customized_grpo.tools.estimate.cost import Cluster, estimate
    from customized_grpo.tools.estimate.devices import DEVICES
    from customized_grpo.tools.estimate.workload import count_run

    work = count_run(load_config(CONFIGS / config, REFERENCE + flags), references)
    result = estimate(work, Cluster(device=DEVICES["h100"], num_devices=NUM_DEVICES))
    stages = result.stages
    numbers = (
        f"{stages['rollout'].seconds:.1f}",
        f"{stages['update'].seconds:.1f}",
        f"{result.seconds_per_update:.1f}",
        f"{result.memory['ddp+checkpointing'].total / 1e9:.0f}",
        f"{result.memory['fsdp+checkpointing'].total / 1e9:.0f}",
    )
    return f"| {label} | {' | '.join(numbers)} |"


def _world_size() -> Iterator[str]:
    """64 prompts whatever the number of devices, and a prompt per device."""
    from customized_grpo.config import load_config
    from customized_grpo.tools.estimate.cost import Cluster, estimate
    from customized_grpo.tools.estimate.devices import DEVICES
    from customized_grpo.tools.estimate.workload import count_run

    yield "| H100 | images / s, 64 prompts | efficiency | with FSDP | images / s, a prompt each |"
    yield "|---|---|---|---|---|"
    path, first = CONFIGS / "flux-kontext.yaml", 0.0
    fixed = count_run(load_config(path, REFERENCE))
    for count in (8, 16, 32, 64, 128, 256, 512):
        grown = load_config(path, [f"--rollout.prompts_per_rollout={count}"])
        cluster = Cluster(device=DEVICES["h100"], num_devices=count)
        sharded = Cluster(device=DEVICES["h100"], num_devices=count, fsdp=True)
        speed, speed_sharded, grown_speed = (
            estimate(work, where).images_per_second
            for work, where in (
                (fixed, cluster),
                (fixed, sharded),
                (replace(fixed, config=grown), cluster),
            )
        )
        first = first or speed / count
        yield (
            f"| {count} | {speed:.1f} | {speed / count / first:.0%} | "
            f"{speed_sharded / count / first:.0%} | {grown_speed:.1f} |"
        )


if __name__ == "__main__":
    main()
