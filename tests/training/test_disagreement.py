"""Where rewards and evaluators disagree, and the KL that holds there (GARDO)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, changed
from loops import make_loop

from customized_grpo.config import RewardConfig, RunConfig, load_config
from customized_grpo.rewards.base import RewardSet
from customized_grpo.training.advantages import disagreement, suspects
from customized_grpo.training.loop import Loop, inner_rows
from customized_grpo.types import RewardScores


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    flags = (
        "--rollout.num_steps 3 --rollout.num_trained_steps 2 --rollout.group_size 4 "
        "--rollout.prompts_per_rollout 2 --rollout.batch_size 3 --train.inner_updates 1 "
        "--train.num_updates 1 --lora.rank 4 --lora.target_modules to_q "
        "--loss.kl_weight 0.1 --loss.kl_share 0.25"
    )
    folder = str(tmp_path_factory.mktemp("runs"))
    return load_config(ROOT / "configs" / "emoji.yaml", ["--output_dir", folder, *flags.split()])


def judged(config: RunConfig, folder: Path) -> Loop:
    loop = make_loop(config, folder)
    loop.evaluators = RewardSet(config.evaluators, torch.device("cpu"), "evaluators")
    return loop


def ranks(scores: list[float]) -> list[float]:
    """Share of the others that each is above, equal ones counting half."""
    return [
        sum((s > o) + 0.5 * (s == o) for j, o in enumerate(scores) if j != i) / (len(scores) - 1)
        for i, s in enumerate(scores)
    ]


def test_a_loop_suspects_what_counting_does(config: RunConfig, tmp_path: Path) -> None:
    loop = judged(config, tmp_path)
    experience = loop.collect(0)
    rollout, prompts = experience.rollout, loop.data.training(0, 2)
    examples = [prompts[group] for group in rollout.group_ids.tolist()]
    assert loop.evaluators is not None
    rewards = loop.rewards.score(rollout.images, examples, rollout.group_ids).scores
    evaluators = loop.evaluators.score(rollout.images, examples).scores
    gaps = torch.full((8,), -math.inf)
    for reward, evaluator in ((0, 0), (1, 1)):  # prompt, identity in both lists
        assert config.rewards[reward].objective == config.evaluators[evaluator].objective
        for group in (0, 1):
            rows = (rollout.group_ids == group).nonzero()[:, 0].tolist()
            ours = ranks(rewards[rows, reward].tolist())
            theirs = ranks(evaluators[rows, evaluator].tolist())
            for row, mine, other in zip(rows, ours, theirs, strict=True):
                gaps[row] = max(gaps[row].item(), mine - other)
    assert experience.metrics["disagreement"] == pytest.approx(gaps.clamp(min=0).mean().item())
    limit = sorted(gaps.tolist())[-2]  # a quarter of 8
    expected = [float(gap >= limit and gap > 0) for gap in gaps.tolist()]
    assert experience.advantages.kl_gate is not None
    assert experience.advantages.kl_gate.tolist() == expected
    assert 0 < sum(expected) < 8
    (rows,) = inner_rows(loop.config)
    batch = loop._batch_of(experience, rows)
    assert batch.kl_gate is not None
    assert batch.kl_gate.view(8, 2).tolist() == [[value] * 2 for value in expected]


def test_for_all_samples_no_evaluator_is_asked(config: RunConfig, tmp_path: Path) -> None:
    loop = make_loop(changed(config, loss={"kl_share": 1.0}), tmp_path)
    experience = loop.collect(0)
    assert experience.advantages.kl_gate is None
    assert "disagreement" not in experience.metrics


def test_what_is_not_known_is_not_suspected() -> None:
    class Plug:
        weight = 1.0

        def __init__(self, objective: str) -> None:
            self.objective = objective

    def plugs(*objectives: str) -> list[RewardConfig]:
        return [Plug(objective) for objective in objectives]  # pyright: ignore

    nan, groups = math.nan, torch.zeros(4, dtype=torch.int64)
    scores = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [nan, 9.0]])
    evaluations = torch.tensor([[1.0], [nan], [0.0], [2.0]])
    found = disagreement(scores, plugs("prompt", "identity"), evaluations, plugs("prompt"), groups)
    # Identity has no evaluator; two that are not known are no rivals either.
    assert found.tolist() == pytest.approx([0 - 1, nan, 1 - 0, nan], nan_ok=True)
    for values, share, expected in (
        (found.tolist(), 1.0, [0, 0, 1, 0]),  # no more disagree at all
        ([0.2, 0.2, 0.1, 0.2], 0.25, [1, 1, 0, 1]),
        ([nan, 0.1, nan, 0.2], 0.5, [0, 0, 0, 1]),
    ):
        held = suspects(torch.tensor(values), share)
        assert held is not None
        assert held.tolist() == expected
    held = suspects(torch.arange(1.0, 101.0), 0.07)
    assert held is not None
    assert held.sum() == 7
    held = suspects(torch.tensor([0.1, 0.3, 0.2]), 1e-9)
    assert held is not None
    assert held.tolist() == [0, 1, 0]  # the smallest share is the one that disagrees most
    assert suspects(torch.full((4,), nan), 0.5) is None


def test_evaluators_that_fail_leave_the_kl_for_all(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = judged(config, tmp_path)
    assert loop.evaluators is not None
    score = loop.evaluators.score

    def lost(*arguments: Any) -> RewardScores:
        found = score(*arguments)
        scores = found.scores.clone()
        scores[:, 0] = torch.nan
        return dataclasses.replace(found, scores=scores, errors=("clip-text: is not there",))

    monkeypatch.setattr(loop.evaluators, "score", lost)
    experience = loop.collect(0)
    assert experience.advantages.kl_gate is None
    assert "disagreement" not in experience.metrics
