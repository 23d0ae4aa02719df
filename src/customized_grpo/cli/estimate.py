"""`cgrpo estimate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from customized_grpo.cli.shared import positive


def add(commands: Any) -> None:
    """Adds the parser."""
    parser = commands.add_parser(
        "estimate",
        help="predict seconds, memory and cost of a run on given devices",
        description="Predict what a run takes on given devices: seconds per stage, memory per "
        "device, device hours and cost. Counted from the config; no weights are needed, nothing is "
        "trained. The rest of CONFIG's fields can be overridden as for `cgrpo train`.",
        epilog="examples:\n  cgrpo estimate configs/flux-kontext.yaml --device h100\n"
        "  cgrpo estimate configs/uno-paper.yaml --num-devices 64 --fsdp true --price 2.5\n"
        "  cgrpo estimate configs/flux-kontext.yaml --rollout.group_size 24 --lora.rank 256\n"
        "  cgrpo estimate configs/emoji.yaml --device cpu --benchmark mfu.json\n"
        "the model and what it leaves out: docs/performance.md",
    )
    parser.add_argument("target", metavar="CONFIG", type=Path, help="YAML file of a run")
    device = "a100-80gb, h100 (default), h200, b200, l40s, rtx4090, or cpu (one core)"
    parser.add_argument("--device", default="h100", help=device)
    number = "devices of the run (default: 1)"
    parser.add_argument("--num-devices", type=positive, default=1, metavar="N", help=number)
    mfu = "share of the bfloat16 peak that is reached (default: 0.4, assumed)"
    parser.add_argument("--mfu", type=float, metavar="SHARE", help=mfu)
    measured = "take the shares from here: output of `python benchmarks/mfu.py --json`"
    parser.add_argument("--benchmark", type=Path, metavar="FILE", help=measured)
    references = "square reference pictures per prompt (default: 1)"
    parser.add_argument("--references", type=positive, default=1, metavar="N", help=references)
    parser.add_argument("--price", type=float, help="of one device for one hour, for the cost")
    parser.add_argument("--json", action="store_true", help="one line of JSON, no tables")
    parser.set_defaults(run=_estimate)


def _estimate(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from customized_grpo.config import load_config

    config = load_config(options.target, overrides)

    from rich.console import Console

    from customized_grpo.tools.estimate.cost import Cluster, estimate, read_mfu
    from customized_grpo.tools.estimate.devices import find_device
    from customized_grpo.tools.estimate.table import as_json, show
    from customized_grpo.tools.estimate.workload import count_run

    rollout_mfu, update_mfu = read_mfu(options.mfu, options.benchmark)
    cluster = Cluster(
        device=find_device(options.device),
        num_devices=options.num_devices,
        fsdp=config.fsdp,
        rollout_mfu=rollout_mfu,
        update_mfu=update_mfu,
    )
    work = count_run(config, options.references)
    result = estimate(work, cluster)
    if options.json:
        print(as_json(work, cluster, result, options.price))
    else:
        show(work, cluster, result, options.price, Console())
