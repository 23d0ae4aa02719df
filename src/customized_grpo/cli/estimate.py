"""`cgrpo estimate`."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from customized_grpo.cli.shared import number, positive
from customized_grpo.errors import ConfigError

logger = logging.getLogger("customized_grpo")


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
        "  cgrpo estimate configs/flux2-klein.yaml --device rtx3090 --memory 20 --price 0.3\n"
        "  cgrpo estimate configs/emoji.yaml --device cpu --benchmark mfu.json\n"
        "the model and what it leaves out: docs/performance.md",
    )
    parser.add_argument("target", metavar="CONFIG", type=Path, help="YAML file of a run")
    device = (
        "rtx3090, rtx4090, rtx5090, l4, a10g, a6000, l40s, a100-40gb, a100-80gb, h100, h200, b200 "
        "or cpu, this machine's (default: the GPU here, else the smallest usual one that fits)"
    )
    parser.add_argument("--device", help=device)
    above = number(0, math.inf, "a number above 0")
    tflops = "dense bfloat16 TFLOP/s, for a card that is not listed; the rest is as --device says"
    parser.add_argument("--tflops", type=above, metavar="N", help=tflops)
    memory = "GB of memory, for a card that is not listed"
    parser.add_argument("--memory", type=above, metavar="GB", help=memory)
    devices = "devices of the run (default: 1)"
    parser.add_argument("--num-devices", type=positive, default=1, metavar="N", help=devices)
    mfu = "share of the peak that is reached (default: 0.4, of a CPU's float32 0.75)"
    parser.add_argument("--mfu", type=float, metavar="SHARE", help=mfu)
    measured = "take the shares from here: output of `python benchmarks/mfu.py --json`"
    parser.add_argument("--benchmark", type=Path, metavar="FILE", help=measured)
    references = "square reference pictures per prompt (default: 1)"
    parser.add_argument("--references", type=positive, default=1, metavar="N", help=references)
    price = "of one device for one hour (default: a listed one of the day that is told)"
    parser.add_argument("--price", type=above, help=price)
    parser.add_argument("--json", action="store_true", help="one line of JSON, no tables")
    parser.set_defaults(run=_estimate)


def _estimate(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from customized_grpo.config import load_config

    config = load_config(options.target, overrides)

    from rich.console import Console

    from customized_grpo.tools.estimate.cards import card_for
    from customized_grpo.tools.estimate.cost import Cluster, assumed_mfu, estimate, read_mfu
    from customized_grpo.tools.estimate.devices import changed_device, find_device
    from customized_grpo.tools.estimate.table import as_json, show
    from customized_grpo.tools.estimate.workload import count_run

    if options.mfu is not None and options.benchmark is not None:
        raise ConfigError(f"--mfu must be left out with --benchmark, got {options.mfu}")
    count = options.num_devices
    device = None if options.device is None else find_device(options.device)
    logger.info("counting the operations and bytes of the run")
    work = count_run(config, options.references)
    device = device or card_for(work, count)
    mfu = assumed_mfu(config, device) if options.mfu is None else options.mfu
    rollout_mfu, update_mfu = read_mfu(mfu, options.benchmark)
    cluster = Cluster(
        device=changed_device(device, options.tflops, options.memory),
        num_devices=count,
        fsdp=config.fsdp,
        rollout_mfu=rollout_mfu,
        update_mfu=update_mfu,
    )
    result = estimate(work, cluster)
    if options.json:
        print(as_json(work, cluster, result, options.price))
    else:
        show(work, cluster, result, options.price, Console())
