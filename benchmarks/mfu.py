"""How near the machine's limit is training? Seconds and MFU of the stages, and the naive structure.

    python benchmarks/mfu.py --json

MFU = useful FLOPs / seconds / the fastest bfloat16 matrix product measured in the same run. FLOPs
are counted: of the rollout with its adapters merged, of the update without anything computed
twice, of the transformer as this device computes it (on a CPU FLUX.1's last block leaves out the
tokens that nobody reads), of everything else by `customized_grpo.tools.estimate`. The naive
structure does the same work: batch 1 in the rollout, one (sample, step) pair per backward, rewards
one image at a time; same config, same trained pairs.
"""

from __future__ import annotations

import json
from dataclasses import replace

from _iterations import STAGES, measure, parse, peak_memory, plan


def main() -> None:
    """Measures and prints."""
    options = parse(
        __doc__ or "",
        ("--repeats", {"type": int, "default": 5, "help": "iterations of each (default: 5)"}),
        ("--skip-naive", {"action": "store_true", "help": "do not run the naive structure"}),
    )
    import torch

    from customized_grpo.config import load_config
    from customized_grpo.devices import pick_device
    from customized_grpo.runs.log import describe_environment
    from customized_grpo.tools.estimate.devices import matmul_peak
    from customized_grpo.tools.estimate.workload import count_run

    torch.set_num_threads(options.threads)
    config = load_config(options.config)
    device = pick_device(config.device)
    work = _as_computed(count_run(config), device)
    flops = plan(work)
    before = matmul_peak(torch.bfloat16, device)
    seconds = measure(config, options.repeats)
    memory = peak_memory(device)
    naive = None if options.skip_naive else measure(_naive(config), options.repeats)
    peak = max(before, matmul_peak(torch.bfloat16, device))
    result = {
        "rollout_mfu": flops["rollout"] / seconds["rollout"] / peak,
        "update_mfu": flops["update"] / seconds["update"] / peak,
        "speedup_vs_naive": naive and naive["iteration"] / seconds["iteration"],
        "peak_flops_per_second": peak,
        "images_per_second": work.samples / seconds["iteration"],
        "peak_memory_bytes": memory,
        "seconds": seconds,
        "naive_seconds": naive,
        "flops": flops,
        "images": work.samples,
        "pairs": work.pairs,
        "repeats": options.repeats,
        "threads": options.threads,
        "environment": describe_environment(device),
        "config": str(options.config),
    }
    _show(result)
    if options.json:
        print(json.dumps(result))


def _as_computed(work, device):
    """The workload with the FLOPs of this device's own passes through the transformer."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from customized_grpo.training.build import build_world, make_trainable
    from customized_grpo.training.policy import make_policy

    data, generator = build_world(work.config, device)
    conditioning = generator.encode(data.training(0, 1))
    noise = generator.noise(1, torch.Generator().manual_seed(0))
    policy, index = make_policy(generator, work.config), torch.zeros(1, dtype=torch.int64)

    def count(backward: bool) -> int:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            velocity = policy.velocity(noise, index.to(device), conditioning)
            if backward:
                velocity.sum().backward()
        return counter.get_total_flops()

    with torch.no_grad():
        forward = count(backward=False)
    make_trainable(generator, work.config)
    passes = work.guidance_passes
    counted = {"forward_flops": forward / passes, "pair_flops": count(backward=True) / passes}
    return replace(work, transformer=replace(work.transformer, **counted))


def _naive(config):
    return replace(
        config,
        rollout=replace(config.rollout, batch_size=1),
        train=replace(config.train, micro_batch_size=1),
    )


def _show(result) -> None:
    seconds, naive, flops = result["seconds"], result["naive_seconds"], result["flops"]
    peak = result["peak_flops_per_second"]
    print(f"bf16 matmul peak: {peak / 1e9:,.0f} GFLOP/s, {result['threads']} threads")
    print(f"{'stage':10}{'GFLOP':>10}{'seconds':>10}{'MFU':>8}{'naive s':>10}")
    for stage in (*STAGES, "iteration"):
        work = flops.get(stage, sum(flops.values()))
        mfu = work / seconds[stage] / peak if seconds[stage] else 0.0
        other = f"{naive[stage]:10.3f}" if naive else ""
        print(f"{stage:10}{work / 1e9:10.1f}{seconds[stage]:10.3f}{mfu:8.1%}{other}")
    print(
        f"{result['images_per_second']:.1f} images / s, "
        f"{result['peak_memory_bytes'] / 1e9:.2f} GB at most"
    )
    if naive:
        print(f"naive structure / this: {result['speedup_vs_naive']:.2f} x")


if __name__ == "__main__":
    main()
