"""Fixtures on the embedded models: real checkpoints, loaded as the big ones are."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from helpers import ROOT

from customized_grpo.config import RunConfig, load_config
from customized_grpo.data import images
from customized_grpo.data.emoji.source import EmojiSource
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.generators.flux_kontext import FluxKontextConfig
from customized_grpo.types import Example


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """`cgrpo` sets the level of the log, which would stay for the tests that come after."""
    yield
    logging.getLogger("customized_grpo").setLevel(logging.NOTSET)


@pytest.fixture
def without_heic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where pillow-heif is not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images.reads_heic.cache_clear()
    yield
    images.reads_heic.cache_clear()


@pytest.fixture
def tiny_config(tmp_path: Path) -> RunConfig:
    """configs/emoji.yaml, cut down to seconds; float32 so that numbers can be compared tightly."""
    overrides = {
        "output_dir": str(tmp_path / "runs"),
        "mixed_precision": "no",
        "rollout.num_steps": 4,
        "rollout.num_trained_steps": 2,
        "rollout.group_size": 3,
        "rollout.prompts_per_rollout": 2,
        "train.num_updates": 2,
        "train.inner_updates": 1,
        "evaluation.num_examples": 4,
        "evaluation.validate_every": 0,
    }
    flags = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
    return load_config(ROOT / "configs" / "emoji.yaml", flags)


@pytest.fixture
def generator() -> Flux1Generator:
    """A fresh embedded generator: tests may add adapters to it."""
    return FluxKontextConfig(path="embedded:generator").build(torch.device("cpu"))


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    return EmojiSource(seed=0).training(0, 4)
