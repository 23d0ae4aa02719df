"""Several updates per rollout, each on samples of its own of every group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import assert_near, changed
from loops import make_loop

from customized_grpo.config import RunConfig
from customized_grpo.training.loop import Experience, Loop, inner_rows
from customized_grpo.training.rollout import noisy_steps

NOISY = 2**18  # a log-probability divides the rounding of a mean by a variance


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    """The released recipe in small: three updates, each on a third of each of two groups."""
    return changed(
        tiny_config,
        rollout={"group_size": 6, "prompts_per_rollout": 2},
        lora={"rank": 4},
        train={
            "inner_updates": 3,
            "num_updates": 3,
            "split": "samples",
            "micro_batch_size": 3,
            "ema_decay": None,
        },
    )


def plain_update(loop: Loop, experience: Experience, inner: int) -> tuple[list[float], int]:
    """One update as the released trainer makes it, pair by pair: ratios, and how many are clipped.

    It takes the samples of a group in order, a third of them for each optimizer step; the
    advantages were normalised over the whole group.
    """
    config, rollout = loop.config, experience.rollout
    size, num_groups = config.rollout.group_size, config.rollout.prompts_per_rollout
    part = size // config.train.inner_updates
    rows = [
        g * size + i for g in range(num_groups) for i in range(inner * part, (inner + 1) * part)
    ]
    num_trained, reach = rollout.step_index.shape[1], config.loss.clip_range
    factors = loop.policy.step_weights(
        config.loss.step_weight, noisy_steps(config.rollout), ratio_norm=False
    )
    ratios, clipped = [], 0
    loop.optimizer.zero_grad()
    for row in rows:
        for k in range(num_trained):
            step = rollout.step_index[row, k]
            mean, std = loop.policy.transition(
                rollout.latents[row, k][None],
                step[None],
                experience.conditioning.take(torch.tensor([row])),
            )
            density = torch.distributions.Normal(mean, std.expand_as(mean))
            new = density.log_prob(rollout.next_latents[row, k][None]).mean()
            old = new.detach() if inner == 0 else rollout.log_probs[row, k]
            ratio = torch.exp(new - old)
            advantage = experience.advantages.per_step[row, step] * factors[step]
            plain = -advantage * ratio
            held = -advantage * ratio.clamp(1 - reach, 1 + reach)
            (torch.maximum(plain, held) / (len(rows) * num_trained)).backward()
            ratios.append(ratio.item())
            clipped += int(held > plain)
    torch.nn.utils.clip_grad_norm_(loop.parameters, config.train.max_grad_norm)
    loop.optimizer.step()
    return ratios, clipped


@pytest.mark.parametrize("step_weight", [pytest.param("none", marks=pytest.mark.slow), "equal"])
def test_updates_on_parts_of_groups_are_those_of_a_plain_loop(
    config: RunConfig, tmp_path: Path, step_weight: str
) -> None:
    config = changed(config, loss={"step_weight": step_weight})
    ours, plain = make_loop(config, tmp_path), make_loop(config, tmp_path)
    start = [p.detach().clone() for p in plain.parameters]
    experience = plain.collect(0)
    updates = ours.iterate(0)
    for inner in range(3):
        stats, (ratios, clipped) = next(updates), plain_update(plain, experience, inner)
        deviation = torch.tensor(ratios).sub(1).abs().mean()
        assert_near(stats["ratio_abs_dev"], deviation, NOISY, scale=1)
        assert stats["clip_fraction"] == pytest.approx(clipped / len(ratios))
        for parameter, expected in zip(ours.parameters, plain.parameters, strict=True):
            assert_near(parameter, expected)
        if inner:  # ratio and clip are alive
            assert deviation > config.loss.clip_range
            assert 0 < clipped < len(ratios)
    moved = max((p - s).abs().max() for p, s in zip(ours.parameters, start, strict=True))
    assert moved > 1e-4


def test_every_sample_has_its_update_and_its_whole_groups_advantage(
    config: RunConfig, tmp_path: Path
) -> None:
    loop = make_loop(config, tmp_path)
    parts = inner_rows(loop.config)
    assert [part.tolist() for part in parts] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    experience = loop.collect(0)
    by_group = experience.advantages.per_objective.view(2, 6, -1)
    assert_near(by_group.mean(1), torch.zeros_like(by_group.mean(1)), scale=1)
    assert_near(by_group.std(1), torch.ones_like(by_group.std(1)))
    assert by_group[:, :2].mean(1).abs().max() > 0.1  # but not in the part that an update takes


def test_whole_groups_are_the_default(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = changed(tiny_config, train={"inner_updates": 2})
    assert [part.tolist() for part in inner_rows(config)] == [
        [0, 1, 2],
        [3, 4, 5],
    ]
