"""Fixtures on the embedded models: real checkpoints, loaded as the big ones are."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from helpers import tiny
from hypothesis import HealthCheck, settings

from customized_grpo.config import RunConfig
from customized_grpo.data import images
from customized_grpo.data.emoji.source import EmojiSource
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.generators.flux_kontext import FluxKontextConfig
from customized_grpo.types import Example

# No test asserts how long something takes: the first example may import or write what others find.
settings.register_profile("any pace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any pace")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests come first, then those with most: what remains for the end is
    short, and no process waits long for the last one."""
    tests = Counter(item.path for item in items)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (-slow[item.path], -tests[item.path]))


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
    """See ``tiny``."""
    return tiny(tmp_path)


@pytest.fixture
def generator() -> Flux1Generator:
    """A fresh embedded generator: tests may add adapters to it."""
    return FluxKontextConfig(path="embedded:generator").build(torch.device("cpu"))


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    return EmojiSource(seed=0).training(0, 4)
