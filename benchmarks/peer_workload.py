"""CPU time of one iteration of the work that a peer was measured on (docs/performance.md).

    python benchmarks/peer_workload.py --model DIR --text-tokens 32 --json

4 prompts x 4 samples, 64 x 64 px, 6 steps of which 5 are trained, KL 1e-3, LoRA of rank 8 on
to_q/k/v/out.0, one optimizer update, bf16 autocast, one thread: config -> build -> rollout ->
rewards -> advantages -> update, by the package's own Session. The last line is the result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from customized_grpo.config import RunConfig, read_config
from customized_grpo.devices import pick_device
from customized_grpo.rewards.base import RewardSet
from customized_grpo.runs.log import RunLog, run_folder
from customized_grpo.training.build import build_world, make_trainable
from customized_grpo.training.session import Session
from customized_grpo.training.validation import SampleGrid

STAGES = ("rollout", "reward", "update")  # sampling + optimise; data and logging are not in it
CPU = torch.device("cpu")


def workload(model: str, text_tokens: int, output: str, updates: int) -> RunConfig:
    """The peer's workload as a run; its loss penalises the velocity's distance from the base, ours
    the transition's, the same squares with a weight per step: one more forward pass either way."""
    raw = {
        "name": "peer-workload",
        "output_dir": output,
        "device": "cpu",
        "mixed_precision": "bf16",
        "data": {"type": "emoji"},
        "generator": {
            "type": "flux-kontext",
            "path": model,
            "guidance_scale": 2.5,
            "height": 64,
            "width": 64,
            "max_sequence_length": text_tokens,
        },
        "rewards": [{"type": "dinov2", "objective": "identity", "path": "embedded:reward-dino"}],
        "lora": {
            "rank": 8,
            "alpha": 16,
            "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
        },
        "rollout": {
            "num_steps": 6,
            "num_trained_steps": 5,
            "dynamics": "flow",
            "noise_level": 0.7,
            "group_size": 4,
            "prompts_per_rollout": 4,
        },
        "advantage": {"shaping": "linear", "schedule": {"type": "constant", "prompt": 0.0}},
        "loss": {"kl_weight": 1e-3},
        "train": {"num_updates": updates, "sample_every": 0, "save_every": 0},
    }
    return read_config(json.dumps(raw), "peer_workload")


class CpuLog(RunLog):
    """A run log that keeps the CPU time of every iteration, of all threads."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(run_folder(config), config, CPU)
        self.iterations: list[dict[str, float]] = []
        self._stages: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """See RunLog."""
        started = time.process_time()
        with super().timed(stage):
            yield
        self._stages[stage] = self._stages.get(stage, 0.0) + time.process_time() - started

    def row(self, update: int, values: dict[str, float]) -> None:
        """See RunLog."""
        super().row(update, values)
        self.iterations.append({stage: self._stages[stage] for stage in STAGES})
        self._stages = {}


def measure(config: RunConfig) -> list[dict[str, float]]:
    """CPU seconds of the stages of every iteration."""
    data, generator = build_world(config, pick_device(config.device))
    torch.manual_seed(config.seed)
    make_trainable(generator, config)
    samples = SampleGrid(generator, config, data.held_out(1))
    log = CpuLog(config)
    Session(config, data, generator, RewardSet(config.rewards, CPU), samples, None, log).run()
    return log.iterations


def main() -> None:
    """Prints a line per stage and the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a Kontext checkpoint, such as tiny_kontext")
    parser.add_argument("--text-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="only the result, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as output:
        config = workload(arguments.model, arguments.text_tokens, output, arguments.repeats + 1)
        iterations = measure(config)[1:]  # the first one fills the caches
    totals = [sum(stages.values()) for stages in iterations]
    result = {"iteration_cpu_s": statistics.median(totals), "min_cpu_s": min(totals)}
    result |= {f"{s}_cpu_s": statistics.median(i[s] for i in iterations) for s in STAGES}
    result = {name: round(value, 4) for name, value in result.items()}
    if arguments.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:16s} {value:8.3f}" for name, value in result.items()))


if __name__ == "__main__":
    main()
