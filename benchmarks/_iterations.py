"""What the benchmarks share: flags, and the seconds that `cgrpo train` logs for its stages."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from customized_grpo.config import RunConfig

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "emoji.yaml"
STAGES = ("data", "rollout", "reward", "update")
"""As the run log times them; decoding belongs to the rollout, encoding to the data."""


def parse(description: str, *flags: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    """Reads the command line, and sets the number of threads before torch is imported."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="YAML file of a run")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    for name, options in flags:
        parser.add_argument(name, **options)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return options


def measure(config: RunConfig, repeats: int) -> dict[str, float]:
    """Median seconds of every stage and of the ``iteration``, over ``repeats`` after a warm-up.

    It trains, by the trainer itself: whatever is done to make that faster is measured.
    """
    import diffusers
    import transformers

    from customized_grpo.training.train import train

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        return logged(train(shortened(config, repeats, folder)), config)


def shortened(config: RunConfig, repeats: int, folder: str) -> RunConfig:
    """A warm-up and ``repeats`` iterations of nothing but training, as run ``benchmark``."""
    updates = (repeats + 1) * config.train.inner_updates
    return replace(
        config,
        name="benchmark",
        output_dir=folder,
        evaluators=(),
        evaluation=replace(config.evaluation, validate_every=0, classifier=None),
        train=replace(config.train, num_updates=updates, sample_every=0, save_every=0),
    )


def logged(run: Path, config: RunConfig) -> dict[str, float]:
    """Median seconds of a run's stages."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return medians([json.loads(line) for line in lines], config.train.inner_updates)


def medians(rows: list[dict[str, float]], per_iteration: int) -> dict[str, float]:
    """Of rows of the run log, ``per_iteration`` an iteration; the first iteration is left out."""
    rows = [row for row in rows if row["update"]]
    iterations = [rows[i : i + per_iteration] for i in range(0, len(rows), per_iteration)][1:]
    seconds = {
        stage: [sum(row.get(f"seconds/{stage}", 0.0) for row in rows) for rows in iterations]
        for stage in STAGES
    }
    seconds["iteration"] = [sum(stages) for stages in zip(*seconds.values(), strict=True)]
    return {stage: statistics.median(values) for stage, values in seconds.items()}


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's tensors, on a CPU of the whole process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plan(work: Any) -> dict[str, float]:
    """Useful FLOPs of a workload under the stages' names here."""
    flops = {stage.name: stage.flops for stage in work.stages()}
    return {
        "data": flops["encode"],
        "rollout": flops["rollout"] + flops["decode"],
        "reward": flops["reward"],
        "update": flops["update"],
    }
