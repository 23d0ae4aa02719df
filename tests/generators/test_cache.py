"""Encoded once: in memory, on disk, and never for another picture or another model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import assert_near
from toy_world import blocks

from customized_grpo.config import CacheConfig
from customized_grpo.generators.base import Conditioning
from customized_grpo.generators.cache import CachedEncoder
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.generators.flux_kontext import FluxKontextConfig

CONFIG = FluxKontextConfig(path="embedded:generator")
TASKS = [blocks(prompt="a fox", seed=1), blocks(prompt="a cup", seed=2)]


class Counting:
    """The generator, and the number of examples it has encoded."""

    def __init__(self, generator: Flux1Generator) -> None:
        self._generator, self.device, self.encoded = generator, generator.device, 0

    def encode(self, examples: list) -> Conditioning:
        self.encoded += len(examples)
        return self._generator.encode(examples)


@pytest.fixture
def counting(generator: Flux1Generator) -> Counting:
    return Counting(generator)


def equal(a: Conditioning, b: Conditioning) -> bool:
    pairs = [(a.per_sample, b.per_sample), (a.shared, b.shared)]
    return all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in pairs
    )


def test_what_comes_out_is_what_the_generator_makes(
    counting: Counting, generator: Flux1Generator
) -> None:
    encode = CachedEncoder(counting, CONFIG, CacheConfig())
    first = encode([*TASKS, TASKS[0]])
    assert counting.encoded == 2
    assert equal(encode([*TASKS, TASKS[0]]), first)
    assert counting.encoded == 2
    plain = generator.encode([*TASKS, TASKS[0]])
    for name, tensor in plain.per_sample.items():
        assert_near(first.per_sample[name], tensor)


def test_the_least_recently_used_go_first(counting: Counting) -> None:
    encode = CachedEncoder(counting, CONFIG, CacheConfig(num_examples=2))
    other = blocks(prompt="a dog", seed=3)
    for task in (*TASKS, TASKS[0], other):
        encode([task])
    assert counting.encoded == 3
    encode([TASKS[0]])
    assert counting.encoded == 3
    encode([TASKS[1]])
    assert counting.encoded == 4


def test_a_later_run_reads_the_files(counting: Counting, tmp_path: Path) -> None:
    cache = CacheConfig(folder=str(tmp_path / "cache"))
    first = CachedEncoder(counting, CONFIG, cache)(TASKS)
    assert equal(CachedEncoder(counting, CONFIG, cache)(TASKS), first)
    assert counting.encoded == 2


def test_other_pictures_prompts_and_models_are_encoded_anew(
    counting: Counting, tmp_path: Path
) -> None:
    cache = CacheConfig(folder=str(tmp_path))
    CachedEncoder(counting, CONFIG, cache)(TASKS[:1])
    changed = [
        dataclasses.replace(TASKS[0], prompt="a bird"),
        dataclasses.replace(TASKS[0], references=TASKS[1].references),
    ]
    CachedEncoder(counting, CONFIG, cache)(changed)
    assert counting.encoded == 3
    CachedEncoder(counting, dataclasses.replace(CONFIG, max_sequence_length=8), cache)(TASKS[:1])
    assert counting.encoded == 4
