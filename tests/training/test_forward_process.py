"""DiffusionNFT and AWM in a run: updates are those of plain code, on the embedded models."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, assert_near, changed
from loops import make_loop
from torch import Tensor

from customized_grpo.config import (
    AwmAlgorithm,
    GrpoAlgorithm,
    NftAlgorithm,
    RunConfig,
    load_config,
)
from customized_grpo.generators.base import Conditioning
from customized_grpo.training.advantages import objective_weights
from customized_grpo.training.algorithms import make_algorithm
from customized_grpo.training.forward import forward_batch, forward_process
from customized_grpo.training.loop import Experience, Loop, inner_rows
from customized_grpo.training.nonfinite import diagnose, dump_failure, load_failure
from customized_grpo.training.policy import Policy, make_policy
from customized_grpo.training.rollout import collect_rollout
from customized_grpo.training.sampling import sample_images
from customized_grpo.types import Advantages, ForwardBatch, Rollout

ALGORITHMS = {
    "nft": "type: nft, beta: 0.5",
    "awm": "type: awm, power: 0.5, clip_range: 3.0e-3, old_weight: 0.7",
}


def make_config(algorithm: str, folder: Path) -> RunConfig:
    """Two updates per rollout, each on half of two groups; weights of objectives by noise level."""
    flags = (
        f"--algorithm {{{ALGORITHMS[algorithm]}, old_decay: 0.6, old_decay_rate: 0.15}} "
        "--rollout.num_steps 3 --rollout.num_trained_steps 2 --rollout.dynamics ode "
        "--rollout.shared_noise false --rollout.group_size 2 --rollout.prompts_per_rollout 2 "
        "--advantage.shaping linear --advantage.center false --advantage.schedule {type: linear} "
        "--loss.kl_weight 0.1 --loss.step_weight none --train.split samples "
        "--train.micro_batch_size 5 --train.ema_decay null --train.num_updates 2 "
        "--lora.rank 4 --lora.target_modules to_q"
    )
    words = re.findall(r"{.*?}|\S+", flags)
    return load_config(ROOT / "configs" / "emoji.yaml", ["--output_dir", str(folder), *words])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return make_config("nft", tmp_path_factory.mktemp("nft"))


@pytest.fixture(scope="module")
def collected(config: RunConfig) -> tuple[Loop, Experience]:
    """A loop whose old policy is half as strong as the trained one, and its first rollout."""
    loop = make_loop(config, Path(config.output_dir))
    assert loop.algorithm.old is not None
    for tensor in loop.algorithm.old.average:
        tensor.mul_(0.5)
    return loop, loop.collect(0)


@torch.no_grad()
def velocity(
    loop: Loop, weights: list[Tensor], latents: Tensor, step: int, row: Conditioning
) -> Tensor:
    """With other weights of the adapters."""
    now = [p.detach().clone() for p in loop.parameters]
    for parameter, weight in zip(loop.parameters, weights, strict=True):
        parameter.copy_(weight)
    found = loop.policy.velocity(latents[None], torch.tensor([step]), row)[0]
    for parameter, weight in zip(loop.parameters, now, strict=True):
        parameter.copy_(weight)
    return found


def plain_loss(
    algorithm: GrpoAlgorithm | NftAlgorithm | AwmAlgorithm,
    forward: Tensor,
    before: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: float,
    advantage: Tensor,
    clip: float,
) -> tuple[Tensor, bool]:
    """Of one pair, as DiffusionNFT's scripts/train_nft_sd3.py and AWM's scripts/train_sd3_awm.py
    have it (``loss_type: exp_first``, ``weighting: ghuber``), and whether it is clipped."""
    if isinstance(algorithm, NftAlgorithm):
        beta, xt = algorithm.beta, (1 - t) * x0 + t * noise
        r = (advantage.clamp(-clip, clip) / clip) / 2 + 0.5
        parts = []
        for v in (beta * forward + (1 - beta) * before, (1 + beta) * before - beta * forward):
            error = xt - t * v - x0
            parts.append((error**2 / error.detach().abs().mean().clip(min=1e-5)).mean())
        return (r * parts[0] / beta + (1 - r) * parts[1] / beta) * clip, False
    assert isinstance(algorithm, AwmAlgorithm)
    new, old = (
        -((((v - (noise - x0)) ** 2).mean() + 1e-10) ** algorithm.power) * t / algorithm.power
        for v in (forward, before)
    )
    ratio = torch.exp(new - old)
    bounded = ratio.clamp(1 - algorithm.clip_range, 1 + algorithm.clip_range)
    advantage = advantage.clamp(-clip, clip) / clip  # adv_clip_max, times advantage_max: 1
    loss = torch.maximum(-advantage * ratio, -advantage * bounded)
    is_clipped = bool(-advantage * ratio < loss)
    return loss + algorithm.old_weight * ((forward - before) ** 2).mean(), is_clipped


def plain_update(loop: Loop, experience: Experience, old: list[Tensor], rows: list[int]) -> int:
    """One update pair by pair, with the advantage of the pair's noise level; how many clipped."""
    rollout, config = experience.rollout, loop.config
    weights = objective_weights(rollout.sigmas[:-1], config.advantage, loop.rewards.objectives)
    clip, num_levels, num_clipped = config.advantage.clip, config.rollout.num_trained_steps, 0
    loop.optimizer.zero_grad()
    for row in rows:
        rng = torch.Generator().manual_seed(int(rollout.seeds[row]) + 1)
        steps = torch.randperm(3, generator=rng)[:num_levels].sort().values.tolist()
        seeds = torch.randint(2**62, (num_levels,), generator=rng).tolist()
        condition = experience.conditioning.take(torch.tensor([row]))
        x0 = rollout.final_latents[row]
        for step, seed in zip(steps, seeds, strict=True):
            t = rollout.sigmas[step].item()
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
            xt = (1 - t) * x0 + t * noise
            before = velocity(loop, old, xt, step, condition)
            with torch.no_grad(), loop.policy.generator.base_policy():
                base = loop.policy.velocity(xt[None], torch.tensor([step]), condition)[0]
            forward = loop.policy.velocity(xt[None], torch.tensor([step]), condition)[0]
            advantage = experience.advantages.per_objective[row] @ weights[step]
            loss, is_clipped = plain_loss(
                config.algorithm, forward, before, x0, noise, t, advantage, clip
            )
            num_clipped += is_clipped
            loss = loss + 0.1 * ((forward - base) ** 2).mean()
            (loss / (len(rows) * num_levels)).backward()
    torch.nn.utils.clip_grad_norm_(loop.parameters, config.train.max_grad_norm)
    loop.optimizer.step()
    return num_clipped


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_updates_are_those_of_a_plain_loop(algorithm: str, tmp_path: Path) -> None:
    """Over two rollouts: of each, the pictures are the old policy's, which follows slowly."""
    config, cut = make_config(algorithm, tmp_path), []
    ours, plain = make_loop(config, tmp_path), make_loop(config, tmp_path)
    for loop in (ours, plain):
        rate = {"nft": 0.3, "awm": 1.0}[algorithm]  # awm's gradient is the smaller one
        loop.optimizer = torch.optim.SGD(loop.parameters, rate)
    start = [p.detach().clone() for p in plain.parameters]
    old = [p.detach().clone() for p in plain.parameters]
    for number in range(2):
        assert plain.algorithm.old is not None
        for tensor, expected in zip(plain.algorithm.old.average, old, strict=True):
            tensor.copy_(expected)
        experience = plain.collect(number)
        for stats, rows in zip(ours.iterate(number), ([0, 2], [1, 3]), strict=True):
            cut.append(plain_update(plain, experience, old, rows) / (2 * len(rows)))
            assert stats.get("clip_fraction", 0) == pytest.approx(cut[-1])
            assert stats["old_distance"] > 0 or (number, rows[0]) == (0, 0)
            for parameter, expected in zip(ours.parameters, plain.parameters, strict=True):
                assert_near(parameter, expected, terms=2**16)
        decay = min(0.15 * 2 * (number + 1), 0.6)
        old = [
            decay * o + (1 - decay) * p.detach() for o, p in zip(old, plain.parameters, strict=True)
        ]
        assert ours.algorithm.old is not None
        for tensor, expected in zip(ours.algorithm.old.average, old, strict=True):
            assert_near(tensor, expected, terms=2**16)
    moved = max((p - s).abs().max() for p, s in zip(ours.parameters, start, strict=True))
    assert moved > 1e-2
    assert (algorithm == "awm") == any(0 < share < 1 for share in cut)


def test_pictures_are_the_deterministic_ones_of_the_old_policy(
    collected: tuple[Loop, Experience],
) -> None:
    loop, experience = collected
    rollout, policy = experience.rollout, loop.policy
    assert rollout.latents.numel() == rollout.next_latents.numel() == 0  # no trajectory
    rng = torch.Generator().manual_seed(loop.config.seed * 1_000_003)
    noise = policy.generator.noise(4, rng)
    trained = sample_images(policy, experience.conditioning, noise, 4)
    with loop.algorithm.sampling():
        assert_near(rollout.images, sample_images(policy, experience.conditioning, noise, 4))
    assert (rollout.images - trained).abs().max() > 1e-3
    assert torch.equal(sample_images(policy, experience.conditioning, noise, 4), trained)
    assert_near(policy.decode(rollout.final_latents), rollout.images)


def test_the_sampler_of_grpo_samples_the_same_pictures_for_both(
    collected: tuple[Loop, Experience],
) -> None:
    loop, experience = collected
    config = changed(loop.config, rollout={"dynamics": "flow", "shared_noise": True})
    grpo = dataclasses.replace(config, algorithm=GrpoAlgorithm())
    prompts, policy = (
        experience.conditioning.take(torch.tensor([0, 2])),
        make_policy(loop.policy.generator, config),
    )
    images = [
        collect_rollout(
            policy,
            prompts,
            make_algorithm(policy, c).rollout,
            torch.Generator().manual_seed(1),
        ).images
        for c in (config, grpo)
    ]
    assert torch.equal(*images)


def made_rollout() -> Rollout:
    """Eight samples of two numbers each, and no model."""
    empty = torch.zeros(8, 0, 2)
    return Rollout(
        latents=empty,
        next_latents=empty,
        log_probs=torch.zeros(8, 0),
        step_index=torch.zeros(8, 0, dtype=torch.int64),
        sigmas=torch.linspace(1, 0, 5),
        images=torch.zeros(8, 3, 1, 1),
        group_ids=torch.arange(2).repeat_interleave(4),
        final_latents=torch.arange(16.0).view(8, 2),
        seeds=torch.arange(8) * 1000,
    )


def made_advantages(valid: Tensor) -> Advantages:
    per_step = torch.arange(4.0).add(1).repeat(8, 1) * valid[:, None]
    return Advantages(per_objective=torch.ones(8, 2), per_step=per_step, valid=valid)


batch_of = partial(forward_batch, steps=range(4), num_levels=3, algorithm=NftAlgorithm(), clip=5.0)


def test_noise_levels_and_noise_belong_to_the_sample() -> None:
    """Whoever computes it, and with whatever others."""
    rollout, advantages = made_rollout(), made_advantages(torch.ones(8, dtype=torch.bool))
    whole = batch_of(rollout, advantages, torch.arange(8))
    levels = whole.step_index.view(8, 3)
    assert set(levels.flatten().tolist()) == {0, 1, 2, 3}
    assert len({tuple(row) for row in levels.tolist()}) > 1
    assert all(len(set(row)) == 3 for row in levels.tolist())
    assert torch.equal(whole.advantage, whole.step_index + 1.0)  # that of the level
    assert len(set(whole.noise_seed.tolist())) == 24
    part = batch_of(rollout, advantages, torch.tensor([5]))
    sigma = rollout.sigmas[part.step_index]
    assert torch.equal(part.step_index, levels[5])
    alone = forward_process(part, torch.arange(3), sigma)
    together = forward_process(whole, torch.arange(15, 18), sigma)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    late = batch_of(rollout, advantages, torch.arange(8), steps=range(2, 4), num_levels=1)
    assert set(late.step_index.tolist()) == {2, 3}


def test_an_invalid_sample_counts_for_nothing() -> None:
    rollout, advantages = made_rollout(), made_advantages(torch.arange(8) != 1)
    rollout.final_latents[1] = torch.nan
    rows = torch.arange(3)
    left = batch_of(rollout, advantages, rows, num_levels=2)
    kept = batch_of(rollout, advantages, rows, num_levels=2, keep_invalid=True)
    assert left.sample_index.tolist() == [0, 0, 2, 2]
    assert kept.weight.tolist() == [1, 1, 0, 0, 1, 1]
    assert kept.advantage[2:4].tolist() == [0, 0]
    for found in forward_process(kept, torch.arange(6), torch.full((6,), 0.5)):
        assert found.isfinite().all()
    nothing = batch_of(rollout, advantages, torch.tensor([1]))
    assert nothing.step_index.shape == nothing.noise_seed.shape == (0,)


def test_without_memory_nothing_is_kept_and_samples_of_advantage_0_are_not_computed(
    config: RunConfig, tmp_path: Path
) -> None:
    config = changed(config, train={"inner_updates": 1, "split": "groups"}, loss={"kl_weight": 0.0})
    config = dataclasses.replace(config, algorithm=NftAlgorithm(old_decay=0.0))
    loop = make_loop(config, tmp_path)
    assert loop.algorithm.old is None
    experience = loop.collect(0)
    (rows,) = inner_rows(loop.config)
    batch = loop._batch_of(experience, rows)
    assert isinstance(batch, ForwardBatch)
    assert batch.old_velocity is None
    asked, inner = [], Policy.velocity

    def counted(self: Policy, latents: Tensor, *rest: Any) -> Tensor:
        asked.append(len(latents))
        return inner(self, latents, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "velocity", counted)
        advantage = torch.where(batch.sample_index < 2, batch.advantage, 0.0)
        stats = loop.update(
            dataclasses.replace(batch, advantage=advantage), experience.conditioning, is_first=True
        )
    assert sum(asked) == 4  # two levels of each of two samples
    assert stats["old_distance"] == 0
    assert stats["grad_norm"] > 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_update_without_a_valid_sample_changes_nothing(
    collected: tuple[Loop, Experience], algorithm: str, tmp_path: Path
) -> None:
    """As in one process of several, whose samples no reward could score."""
    loop, experience = collected
    trained = make_algorithm(loop.policy, make_config(algorithm, tmp_path))
    none = experience.advantages.valid & False
    advantages = dataclasses.replace(experience.advantages, valid=none)
    rows, conditioning = torch.arange(4), experience.conditioning
    batch = trained.batch(loop.policy, experience.rollout, advantages, conditioning, rows)
    assert batch.old_velocity is not None  # as in the other processes, which then do the same
    assert batch.old_velocity.shape == (0, *experience.rollout.final_latents.shape[1:])
    stats = loop.update(batch, conditioning, is_first=False)
    assert (stats["grad_norm"], stats["skipped_updates"]) == (0, 0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_failed_update_can_be_shown_again(
    collected: tuple[Loop, Experience], algorithm: str, tmp_path: Path
) -> None:
    loop, experience = collected
    config = make_config(algorithm, tmp_path)
    trained = make_algorithm(loop.policy, config)
    conditioning = experience.conditioning
    batch = trained.batch(
        loop.policy, experience.rollout, experience.advantages, conditioning, torch.arange(4)
    )
    assert isinstance(batch, ForwardBatch)
    batch.final_latents[0] = torch.nan
    transformer = loop.policy.generator.transformer
    report = diagnose(loop.policy, batch, conditioning, transformer, 5)
    assert report.inputs == ("final_latents",)
    assert {sample for sample, _ in report.pairs} == {0}
    state, folder = {"policy/x": torch.ones(1)}, tmp_path / "000001"
    dump_failure(folder, config, report, batch, conditioning, state, pinned=False)
    found, conditioning, _, _ = load_failure(folder, config, torch.device("cpu"))
    assert isinstance(found, ForwardBatch)
    assert (found.losses, found.clip) == (config.algorithm.losses, config.advantage.clip)
    assert diagnose(loop.policy, found, conditioning, transformer, 5).pairs == report.pairs
