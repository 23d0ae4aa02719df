"""What does NFT cost beside GRPO? Seconds and peak memory of both, in one run.

    python benchmarks/algorithms.py --json

Both train the config by the trainer itself, each in a process of its own: the same groups, and
for NFT as many noise levels of a sample as GRPO trains steps. NFT samples without noise.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

from _iterations import STAGES, measure, parse, peak_memory


def main() -> None:
    """Measures and prints."""
    options = parse(
        __doc__ or "",
        ("--repeats", {"type": int, "default": 5, "help": "iterations of each (default: 5)"}),
    )
    from customized_grpo.config import GrpoAlgorithm, NftAlgorithm, load_config

    grpo = replace(load_config(options.config), algorithm=GrpoAlgorithm())
    ode = replace(grpo.rollout, dynamics="ode", shared_noise=False)
    loss = replace(grpo.loss, step_weight="none")  # of GRPO's steps
    nft = replace(grpo, algorithm=NftAlgorithm(), rollout=ode, loss=loss)
    context = get_context("spawn")  # nothing of one is in the memory of the other
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        tasks = (grpo, nft), [options.repeats] * 2, [options.threads] * 2
        found = dict(zip(("grpo", "nft"), pool.map(_measured, *tasks), strict=True))
    print("".join(f"{name:>12}" for name in ("", *found)))
    for stage in (*STAGES, "iteration", "peak GB"):
        print(f"{stage:12}" + "".join(f"{numbers[stage]:12.3f}" for numbers in found.values()))
    ratio = found["nft"]["iteration"] / found["grpo"]["iteration"]
    print(f"an iteration of nft / of grpo: {ratio:.2f}")
    if options.json:
        print(json.dumps({"ratio": ratio, **found}))


def _measured(config, repeats: int, threads: int) -> dict[str, float]:
    import torch

    from customized_grpo.devices import pick_device

    torch.set_num_threads(threads)
    seconds = measure(config, repeats)
    return {**seconds, "peak GB": peak_memory(pick_device(config.device)) / 1e9}


if __name__ == "__main__":
    main()
