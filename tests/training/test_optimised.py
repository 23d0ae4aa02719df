"""What makes an update fast leaves its gradient alone: a plain loop over pairs is the oracle.

The loop has diffusers' own blocks, adapters beside their weights, one pair and one backward at a
time, and computes every pair. The transformer is in float64.
"""

from __future__ import annotations

import copy
import dataclasses
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import perturb_lora
from torch import Tensor

from customized_grpo.config import GrpoAlgorithm, LoraSettings, LossConfig
from customized_grpo.errors import ResourceError
from customized_grpo.generators.base import Conditioning
from customized_grpo.generators.cpu import use_stock_blocks
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.generators.lora import attach_lora
from customized_grpo.tools.estimate.counting import count
from customized_grpo.training import loss as policy_loss
from customized_grpo.training.policy import Policy
from customized_grpo.types import Example, PolicyBatch

NUM_PAIRS = 10
ADVANTAGES = [0.5, -1.0, 0.0, 2.0, 0.0, -0.3, 1.0, 0.0, -2.0, 0.7]
LOSSES = {"pinned": LossConfig(), "kl": LossConfig(kl_weight=0.3)}
SETTINGS = LoraSettings(rank=16, alpha=24)


@dataclasses.dataclass(kw_only=True)
class Case:
    """The same adapters on stock blocks and on ours, and pairs to train them on."""

    plain: Flux1Generator
    fast: Flux1Generator
    batch: PolicyBatch
    conditioning: Conditioning

    def gradient(self, generator: Flux1Generator, loss: LossConfig, size: int | None) -> Tensor:
        policy = make_policy(generator)
        policy_loss.accumulate_gradient(
            policy, self.batch, self.conditioning, loss, pinned=True, micro_batch_size=size
        )
        return taken(generator)


def make_policy(generator: Flux1Generator) -> Policy:
    sigmas = generator.sigmas(6, 1.0)
    return Policy(
        generator=generator, sigmas=sigmas, dynamics="flow", noise_level=0.7, autocast=False
    )


def taken(generator: Flux1Generator) -> Tensor:
    """The gradient, which is reset."""
    trained = {n: p for n, p in generator.transformer.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    flat = torch.cat([p.grad.flatten() for p in trained.values()])
    for parameter in trained.values():
        parameter.grad = None
    return flat


@pytest.fixture
def case(generator: Flux1Generator, examples: list[Example]) -> Case:
    transformer = generator.transformer
    torch.manual_seed(0)
    attach_lora(transformer, SETTINGS, (*generator.lora_targets, "proj_mlp", "net.2"))
    transformer.double()
    perturb_lora(transformer, 0.02)
    conditioning = generator.encode(examples[:2])
    noise = generator.noise(2 * NUM_PAIRS, torch.Generator().manual_seed(0))
    batch = PolicyBatch(
        losses=GrpoAlgorithm().losses,
        latents=noise[:NUM_PAIRS],
        next_latents=noise[NUM_PAIRS:],
        step_index=torch.arange(NUM_PAIRS) % 5,
        old_log_prob=torch.zeros(NUM_PAIRS),
        advantage=torch.tensor(ADVANTAGES),
        sample_index=torch.arange(NUM_PAIRS) % 2,
        weight=torch.ones(NUM_PAIRS),
    )
    plain = copy.copy(generator)
    plain.transformer = copy.deepcopy(transformer)
    use_stock_blocks(plain.transformer)
    plain.pipeline = copy.copy(generator.pipeline)
    plain.pipeline.transformer = plain.transformer
    return Case(plain=plain, fast=generator, batch=batch, conditioning=conditioning)


def plain_gradient(case: Case, loss: LossConfig) -> Tensor:
    policy, batch = make_policy(case.plain), case.batch
    for i in range(NUM_PAIRS):
        row, step = slice(i, i + 1), batch.step_index[i : i + 1]
        condition = case.conditioning.take(batch.sample_index[row])
        mean, std = policy.transition(batch.latents[row], step, condition)
        log_prob = policy.log_prob(batch.next_latents[row], mean, std)
        value = -(batch.advantage[row] * torch.exp(log_prob - log_prob.detach())).sum()
        with torch.no_grad(), case.plain.base_policy():
            reference, _ = policy.transition(batch.latents[row], step, condition)
        distance = (((mean - reference) / std) ** 2).mean() / 2
        ((value + loss.kl_weight * distance) / NUM_PAIRS).backward()
    return taken(case.plain)


def apart(gradient: Tensor, oracle: Tensor) -> float:
    return ((gradient - oracle).norm() / oracle.norm()).item()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("on", ["blocks", "merged", "stacked", "all"])
def test_gradient_is_the_plain_loops(
    case: Case, monkeypatch: pytest.MonkeyPatch, on: str, name: str
) -> None:
    if on not in ("merged", "all"):
        monkeypatch.setattr(policy_loss, "lora_merged", lambda _: nullcontext())
    generator = case.fast if on in ("blocks", "all") else case.plain
    size = {"stacked": None, "all": 4}.get(on, 1)
    gradient = case.gradient(generator, LOSSES[name], size)
    assert apart(gradient, plain_gradient(case, LOSSES[name])) < 1e-5


def test_adapters_are_merged_on_a_cpu_alone(case: Case) -> None:
    transformer = case.fast.transformer
    layer = transformer.transformer_blocks[0].attn.to_q
    for device, is_merged in (("cpu", True), ("meta", False)):
        with torch.no_grad(), policy_loss.lora_merged(transformer.to(device)):
            assert layer.merged is is_merged


def test_pairs_without_advantage_are_not_computed(case: Case) -> None:
    rows = count_rows(case.fast)
    case.gradient(case.fast, LOSSES["pinned"], None)
    assert rows == [NUM_PAIRS - ADVANTAGES.count(0.0)]
    rows.clear()
    case.gradient(case.fast, LOSSES["kl"], None)
    assert rows == [NUM_PAIRS, NUM_PAIRS]  # the KL's gradient is theirs too


def test_all_advantages_zero_leave_a_gradient_of_zero(case: Case) -> None:
    case.batch = dataclasses.replace(case.batch, advantage=torch.zeros(NUM_PAIRS))
    assert not case.gradient(case.fast, LOSSES["pinned"], None).any()


def count_rows(generator: Flux1Generator, fits: int | None = None) -> list[int]:
    """Batch sizes of the forward passes; above ``fits`` the backward pass runs out of memory, late:
    most gradients are there by then."""
    rows: list[int] = []
    plain, first = generator.velocity, generator.transformer.transformer_blocks[0].attn.to_q

    def velocity(latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        rows.append(len(latents))
        if fits is not None and len(latents) > fits:
            merged = first.base_layer.weight
            late = merged if merged.requires_grad else first.lora_A["default"].weight
            handle = late.register_hook(lambda _: fail(handle))
        return plain(latents, sigma, conditioning)

    def fail(handle: torch.utils.hooks.RemovableHandle) -> None:
        handle.remove()
        raise torch.OutOfMemoryError("injected")

    generator.velocity = velocity  # pyright: ignore[reportAttributeAccessIssue]
    return rows


@pytest.mark.parametrize("merged", [True, False])
def test_out_of_memory_halves_the_micro_batch_and_not_the_gradient(
    case: Case, monkeypatch: pytest.MonkeyPatch, merged: bool
) -> None:
    if not merged:
        monkeypatch.setattr(policy_loss, "lora_merged", lambda _: nullcontext())
    loss = LOSSES["pinned"]
    rows = count_rows(case.fast, fits=2)
    stats = policy_loss.accumulate_gradient(
        make_policy(case.fast), case.batch, case.conditioning, loss, pinned=True,
        micro_batch_size=None,
    )  # fmt: skip
    assert rows == [7, 4, 2, 2, 2, 1]
    assert stats["micro_batch_size"] == 2
    assert apart(taken(case.fast), plain_gradient(case, loss)) < 1e-5


def test_a_micro_batch_in_the_middle_that_does_not_fit_begins_the_update_again(case: Case) -> None:
    loss, rows = LOSSES["pinned"], count_rows(case.fast)
    counted, failed = case.fast.velocity, []

    def velocity(latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        if len(rows) == 2 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("injected")
        return counted(latents, sigma, conditioning)

    case.fast.velocity = velocity  # pyright: ignore[reportAttributeAccessIssue]
    gradient = case.gradient(case.fast, loss, 2)
    assert rows == [2, 2, *[1] * 7]
    assert apart(gradient, plain_gradient(case, loss)) < 1e-5


def test_one_gradient_is_held_however_many_micro_batches(case: Case) -> None:
    """Not that of the micro-batches before beside that of the one at work."""
    case.fast.transformer.requires_grad_(True)

    def peak(num_pairs: int) -> float:
        fields = {f.name: getattr(case.batch, f.name) for f in dataclasses.fields(case.batch)}
        parts = {n: v[:num_pairs] for n, v in fields.items() if isinstance(v, torch.Tensor)}
        batch = dataclasses.replace(case.batch, **parts)
        update = partial(
            policy_loss.accumulate_gradient, make_policy(case.fast), batch, case.conditioning,
            LOSSES["pinned"], pinned=True, micro_batch_size=1,
        )  # fmt: skip
        return count(update).peak

    gradient = sum(p.numel() * p.element_size() for p in case.fast.transformer.parameters())
    peak(1)  # what is kept from then on is no gradient
    assert peak(4) - peak(1) < gradient / 2


def test_a_single_pair_that_does_not_fit_is_an_error(case: Case) -> None:
    count_rows(case.fast, fits=0)
    with pytest.raises(ResourceError, match=r"one .* pair alone does not fit the memory"):
        case.gradient(case.fast, LOSSES["pinned"], None)
