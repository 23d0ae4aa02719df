"""Qwen-Image-2.1's text and references: computed once, with the numbers and gradients of computing
them at every step. The oracle is a pass of the transformer over everything, as without a cache."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import QwenImage21Transformer2DModel
from families import FAMILIES, HEIGHT_21, WIDTH_21, pictures, run_config
from helpers import assert_near, perturb_lora
from torch import Tensor
from toy_world import blocks

from customized_grpo.config import GrpoAlgorithm, LoraSettings, LossConfig
from customized_grpo.generators.base import Conditioning
from customized_grpo.generators.lora import attach_lora
from customized_grpo.generators.qwen_image_21 import QwenImage21Config, QwenImage21Generator
from customized_grpo.runs.sharding import shard
from customized_grpo.training import loss as policy_loss
from customized_grpo.training.policy import Policy, make_policy
from customized_grpo.training.rollout import collect_rollout
from customized_grpo.types import PolicyBatch, Rollout

CPU = torch.device("cpu")
TASKS = [
    blocks(2, seed=1),
    blocks(2, prompt="a dog in the snow at night, wearing a hat", seed=2),
]
NUM_PAIRS = 8
(FAMILY,) = (family for family in FAMILIES if family.name == "qwen-image-2.1")


class Joint(QwenImage21Generator):
    """Every pass sees everything."""

    def _one(self, key: Any, hidden: Tensor, sigma: Tensor, text: Tensor, shared: Any) -> Tensor:
        count = math.prod(self.grid)
        images = torch.cat([hidden[:, count:], hidden[:, :count]], 1)
        return self._run(images, sigma, text, shared, self._shapes(shared))[:, -count:]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("qwen-image-2.1")
    FAMILY.build(folder)
    return str(folder)


def build(
    checkpoint: str, *, joint: bool = False, lora: bool = True, **fields: Any
) -> QwenImage21Generator:
    config = FAMILY.config(checkpoint)
    assert isinstance(config, QwenImage21Config)
    generator = dataclasses.replace(config, **fields).build(CPU)
    if joint:
        generator.__class__ = Joint
    if lora:
        torch.manual_seed(0)
        settings = LoraSettings(rank=4, alpha=8, target_modules=("to_q", "to_k", "to_v", "out"))
        attach_lora(generator.transformer, settings, generator.lora_targets)
        perturb_lora(generator.transformer)
    else:
        generator.transformer.requires_grad_(True)
    return generator


def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str | None]:
    """How many passes of the transformer there are from now on, by ``kv_cache_mode``."""
    counted: Counter[str | None] = Counter()
    forward = QwenImage21Transformer2DModel.forward

    def count(self: Any, *given: Any, **named: Any) -> Any:
        counted[named.get("kv_cache_mode")] += 1
        return forward(self, *given, **named)

    monkeypatch.setattr(QwenImage21Transformer2DModel, "forward", count)
    return counted


def policy_of(generator: QwenImage21Generator) -> Policy:
    return Policy(
        generator=generator, sigmas=generator.sigmas(5, None), dynamics="flow", noise_level=0.7,
        autocast=False,
    )  # fmt: skip


def sampled(generator: QwenImage21Generator, path: Path, **fields: Any) -> Rollout:
    config = run_config(FAMILY, "nowhere", path).rollout
    config = dataclasses.replace(config, group_size=4, num_steps=5, **fields)
    rng = torch.Generator().manual_seed(0)
    return collect_rollout(policy_of(generator), generator.encode(TASKS), config, rng)


@pytest.mark.parametrize("cached", [False, True])
def test_the_stock_pipeline_with_its_cache_and_without(checkpoint: str, cached: bool) -> None:
    generator, stock = build(checkpoint, lora=False), FAMILY.load(checkpoint)
    noise = generator.noise(1, torch.Generator().manual_seed(0))
    policy = dataclasses.replace(policy_of(generator), noise_level=0.0)
    ours, conditioning = noise, generator.encode(TASKS[:1])
    for step in range(5):
        with torch.no_grad():
            ours, _ = policy.transition(ours, torch.tensor([step]), conditioning)
    theirs = stock(
        image=pictures(TASKS[0]), prompt=TASKS[0].prompt,
        height=HEIGHT_21, width=WIDTH_21, num_inference_steps=5, latents=noise,
        output_type="latent", output_resolution=96, use_kv_cache=cached,
    ).images  # fmt: skip
    assert_near(ours, theirs)


@pytest.mark.parametrize("size", [None, 3])
def test_a_rollout_computes_the_prefix_of_a_prompt_once(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    """Whatever the batches, and in each rollout with the weights of the time."""
    plain, kept = build(checkpoint, joint=True), build(checkpoint)
    for std in (0.05, 0.1):
        for generator in (plain, kept):
            perturb_lora(generator.transformer, std)
        oracle = sampled(plain, tmp_path, batch_size=size)
        with monkeypatch.context() as patched:
            counted = passes(patched)
            ours = sampled(kept, tmp_path, batch_size=size)
        assert counted["extract"] == len(TASKS)
        assert set(counted) == {"extract", "cached"}
        assert_near(ours.images, oracle.images)
        assert_near(ours.latents, oracle.latents)


def test_steps_that_a_group_shares_keep_it_too(checkpoint: str, tmp_path: Path) -> None:
    fields = {"window": (2, 4), "shared_noise": True, "num_trained_steps": 2}
    ours, oracle = (
        sampled(build(checkpoint, joint=joint), tmp_path, batch_size=3, **fields)
        for joint in (False, True)
    )
    assert_near(ours.latents, oracle.latents)


def pairs_of(generator: QwenImage21Generator) -> tuple[PolicyBatch, Conditioning]:
    noise = generator.noise(2 * NUM_PAIRS, torch.Generator().manual_seed(0))
    batch = PolicyBatch(
        losses=GrpoAlgorithm().losses,
        latents=noise[:NUM_PAIRS],
        next_latents=noise[NUM_PAIRS:],
        step_index=torch.arange(NUM_PAIRS) % 4,
        old_log_prob=torch.zeros(NUM_PAIRS),
        advantage=torch.linspace(-1, 2, NUM_PAIRS),
        sample_index=torch.arange(NUM_PAIRS) // 2,
        weight=torch.ones(NUM_PAIRS),
    )
    prompt_of_sample = torch.tensor([0, 0, 1, 1])
    return batch, generator.encode(TASKS).take(prompt_of_sample)


def gradient(
    generator: QwenImage21Generator, size: int | None, kl_weight: float = 0.0
) -> tuple[Tensor, dict[str, float]]:
    batch, conditioning = pairs_of(generator)
    stats = policy_loss.accumulate_gradient(
        policy_of(generator), batch, conditioning, LossConfig(kl_weight=kl_weight),
        pinned=True, micro_batch_size=size,
    )  # fmt: skip
    trained = [p for p in generator.transformer.parameters() if p.requires_grad]
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    return torch.cat([part.flatten() for part in flat]), stats


@pytest.mark.parametrize("size", [None, 1, 3])
@pytest.mark.parametrize(
    "fields",
    [{"lora": True}, {"lora": True, "gradient_checkpointing": True}, {"lora": False}],
    ids=["lora", "checkpointing", "all weights"],
)
def test_an_update_computes_it_once_with_its_gradient(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, fields: dict[str, bool], size: int | None
) -> None:
    oracle, _ = gradient(build(checkpoint, joint=True, **fields), size=1)
    generator = build(checkpoint, **fields)
    counted = passes(monkeypatch)
    ours, _ = gradient(generator, size)
    assert counted["extract"] == len(TASKS)
    assert None not in counted
    assert oracle.norm() > 0
    assert (ours - oracle).norm() <= 1e-5 * oracle.norm()


@pytest.mark.parametrize("size", [None, 1, 3])
def test_the_untuned_model_has_a_prefix_of_its_own(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    oracle, expected = gradient(build(checkpoint, joint=True), 1, kl_weight=30.0)
    without, _ = gradient(build(checkpoint, joint=True), 1)
    generator = build(checkpoint)
    counted = passes(monkeypatch)
    ours, stats = gradient(generator, size, kl_weight=30.0)
    assert counted["extract"] == 2 * len(TASKS)
    assert stats["kl"] == pytest.approx(expected["kl"], rel=1e-4)
    assert (ours - oracle).norm() <= 1e-5 * oracle.norm()
    assert (without - oracle).norm() > 1e-2 * oracle.norm()


def test_what_a_micro_batch_out_of_memory_has_left_is_dropped(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the gradient that a prefix has collected and not yet handed on."""
    oracle, _ = gradient(build(checkpoint, joint=True), size=1)
    generator, pairs_loss = build(checkpoint), policy_loss._pairs_loss

    def fits(*given: Any) -> Any:
        rows = given[-1]
        if len(rows) > 1 and rows[0] == 2:
            raise torch.OutOfMemoryError("injected")
        return pairs_loss(*given)

    monkeypatch.setattr(policy_loss, "_pairs_loss", fits)
    ours, stats = gradient(generator, size=2)
    assert stats["micro_batch_size"] == 1
    assert (ours - oracle).norm() <= 1e-5 * oracle.norm()


def test_a_checkpoint_without_causal_conditions_has_none(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, stock = build(checkpoint, lora=False), FAMILY.load(checkpoint)
    for pipeline in (generator.pipeline, stock):
        pipeline.transformer.register_to_config(causal_condition=False)
    noise = generator.noise(1, torch.Generator().manual_seed(0))
    conditioning, ours = generator.encode(TASKS[:1]), noise
    policy = dataclasses.replace(policy_of(generator), noise_level=0.0)
    counted = passes(monkeypatch)
    for step in range(5):
        with torch.no_grad():
            ours, _ = policy.transition(ours, torch.tensor([step]), conditioning)
    assert set(counted) == {None}
    assert_near(ours, FAMILY.latents(stock, TASKS[0], noise, 5))


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_sharded_every_process_takes_as_many_passes(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One a pair, whatever prompts a process has: a pass is a meeting of all."""
    oracle, _ = gradient(build(checkpoint, joint=True, lora=False), size=1)
    generator = build(checkpoint, lora=False)
    shard(generator.transformer, CPU, 1)
    counted = passes(monkeypatch)
    batch, conditioning = pairs_of(generator)
    policy_loss.accumulate_gradient(
        policy_of(generator), batch, conditioning, LossConfig(), pinned=True, micro_batch_size=4
    )
    assert counted == {None: NUM_PAIRS}
    parts = [p.grad for p in generator.transformer.parameters()]
    ours = torch.cat([p.full_tensor().flatten() for p in parts if p is not None])
    assert ours.norm().item() == pytest.approx(oracle.norm().item(), rel=1e-5)


def test_a_run_under_autocast_takes_the_same_way(checkpoint: str, tmp_path: Path) -> None:
    """In bfloat16 what was kept and what was not round alike: both are the same passes."""
    config = dataclasses.replace(run_config(FAMILY, checkpoint, tmp_path), mixed_precision="bf16")
    generator = build(checkpoint)
    policy, conditioning = make_policy(generator, config), generator.encode(TASKS[:1])
    noise = generator.noise(1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = policy.velocity(noise, torch.tensor([1]), conditioning)
        with generator.keeping():
            policy.velocity(noise, torch.tensor([0]), conditioning)
            again = policy.velocity(noise, torch.tensor([1]), conditioning)
    assert torch.equal(first, again)
