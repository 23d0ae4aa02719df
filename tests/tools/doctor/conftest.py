"""The config of the other tests and its counts, each made once: both take time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers import ROOT, changed

from customized_grpo.config import RunConfig, load_config
from customized_grpo.tools.doctor.memory import predict
from customized_grpo.tools.estimate.workload import Workload


@pytest.fixture(scope="session")
def emoji() -> Workload:
    """Counts of configs/emoji.yaml."""
    return predict(load_config(ROOT / "configs" / "emoji.yaml"))


@pytest.fixture(scope="session")
def loaded() -> RunConfig:
    return load_config(ROOT / "configs" / "emoji.yaml")


@pytest.fixture
def tiny_config(loaded: RunConfig, tmp_path: Path) -> RunConfig:
    config = changed(
        loaded,
        rollout={"num_steps": 4, "num_trained_steps": 2, "group_size": 3, "prompts_per_rollout": 2},
        train={"num_updates": 2, "inner_updates": 1},
        evaluation={"num_examples": 4},
    )
    output = str(tmp_path / "runs")
    return dataclasses.replace(config, output_dir=output, mixed_precision="no")
