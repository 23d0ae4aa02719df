"""Run folders whose log is written by the real log, row by row, without training."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import changed

from customized_grpo.config import RunConfig
from customized_grpo.runs.log import RunLog

REWARDS = ("preference", "dinov2")


def begin(config: RunConfig, *, num_updates: int = 8) -> RunLog:
    """A run of two updates per rollout of 2 prompts x 3 images that has made none yet."""
    config = changed(config, train={"num_updates": num_updates, "inner_updates": 2})
    return RunLog(Path(config.output_dir, config.name), config, torch.device("cpu"))


def add(log: RunLog, update: int, **values: float) -> None:
    """A row as the trainer writes it: 4 s of sampling before the first of two updates of 1 s."""
    row = {"loss": 0.5, "clip_fraction": 0.25, "grad_norm": 2.0, "skipped_updates": 0.0}
    log._seconds["update"] = log._seconds.get("update", 1.0)
    if update % 2:
        for name in REWARDS:
            row[f"reward/{name}/mean"] = update / 100
            row[f"reward/{name}/std"] = 0.1
        shares = (0.5, 0.125, 0.25, 0.375, 0.125)
        names = ("both_positive", "identity_only", "prompt_only", "conflicted", "both_negative")
        row |= {f"share/{name}": share for name, share in zip(names, shares, strict=True)}
        row |= {"zero_variance_groups": 0.0, "invalid_samples": 0.0}
        log._seconds["rollout"] = 4.0
    log.row(update, row | values)


def cut_off(log: RunLog) -> None:
    """The beginning of a row, as a reader sees it while the row is being written."""
    with (log.folder / "metrics.jsonl").open("a") as file:
        file.write('{"update": 99, "loss": 0.')
