from dataclasses import replace

import pytest
import torch
from helpers import assert_near

from customized_grpo.config import (
    AdvantageConfig,
    ConstantSchedule,
    CosineSchedule,
    CustomSchedule,
    LinearSchedule,
)
from customized_grpo.errors import ConfigError
from customized_grpo.ops import group_normalize, shifted_sigmas, synergy_bonus, tdw_weights
from customized_grpo.rewards.clip_text import ClipTextConfig
from customized_grpo.rewards.dinov2 import Dinov2Config
from customized_grpo.training.advantages import (
    assign_credit,
    objective_advantages,
    objective_weights,
    share_statistics,
)
from customized_grpo.types import Advantages

IDENTITY = Dinov2Config(path="x", objective="identity")
PROMPT = ClipTextConfig(path="x", objective="prompt")
GROUPS = torch.arange(2).repeat_interleave(4)
NAMES = ("identity", "prompt")
SIGMAS = shifted_sigmas(25, 3.0)


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.randn(8, 2, generator=torch.Generator().manual_seed(0))


def test_total_is_the_formula_of_the_paper(scores: torch.Tensor) -> None:
    result = assign_credit(scores, GROUPS, SIGMAS, AdvantageConfig(), (IDENTITY, PROMPT), NAMES)
    normalized = group_normalize(scores, GROUPS)
    weights = tdw_weights(SIGMAS[:-1])
    slow = torch.empty(8, 25)
    bonus = synergy_bonus(normalized, 0.4)
    for b in range(8):
        for t in range(25):
            total = weights[t, 0] * normalized[b, 0] + weights[t, 1] * normalized[b, 1] + bonus[b]
            slow[b, t] = total.clamp(-5, 5)
    assert_near(result.per_step, slow, terms=16)
    assert result.valid.all()


def test_columns_follow_the_objective_not_the_order_of_rewards(scores: torch.Tensor) -> None:
    a = objective_advantages(scores, GROUPS, (IDENTITY, PROMPT), NAMES)
    b = objective_advantages(scores.flip(1), GROUPS, (PROMPT, IDENTITY), NAMES)
    assert torch.equal(a, b)


def test_rewards_of_one_objective_mix_after_normalisation(scores: torch.Tensor) -> None:
    three = torch.cat([scores, scores[:, :1].exp() * 100], 1)
    rewards = (replace(IDENTITY, weight=3.0), PROMPT, replace(IDENTITY, name="second"))
    mixed = objective_advantages(three, GROUPS, rewards, NAMES)
    n = group_normalize(three, GROUPS)
    wanted = group_normalize((0.75 * n[:, 0] + 0.25 * n[:, 2])[:, None], GROUPS)
    torch.testing.assert_close(mixed[:, :1], wanted)
    torch.testing.assert_close(mixed[:, 1], n[:, 1])


def test_an_unscorable_image_leaves_its_group_and_gets_nothing(scores: torch.Tensor) -> None:
    scores[1, 1] = torch.nan
    result = assign_credit(scores, GROUPS, SIGMAS, AdvantageConfig(), (IDENTITY, PROMPT), NAMES)
    assert result.valid.tolist() == [True, False] + [True] * 6
    assert (result.per_step[1] == 0).all()
    kept = torch.tensor([0, 2, 3])
    alone = group_normalize(scores[kept], torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(result.per_objective[kept], alone)


@pytest.mark.parametrize(
    ("schedule", "first", "last"),
    [
        (ConstantSchedule(prompt=0.6), 0.6, 0.6),
        (LinearSchedule(high=0.8, low=0.2), 0.8, 0.224),
        (CosineSchedule(high=0.8, low=0.2), 0.8, 0.2024),
    ],
)
def test_schedules_by_name(schedule, first: float, last: float) -> None:
    weights = objective_weights(SIGMAS[:-1], AdvantageConfig(schedule=schedule), NAMES)
    assert weights[0, 1].item() == pytest.approx(first, abs=1e-3)
    assert weights[-1, 1].item() == pytest.approx(last, abs=1e-3)
    torch.testing.assert_close(weights.sum(1), torch.ones(25))


def test_further_objectives_take_their_constant_share() -> None:
    config = AdvantageConfig(extra_weights={"quality": 0.2})
    names = ("identity", "prompt", "quality")
    weights = objective_weights(SIGMAS[:-1], config, names)
    torch.testing.assert_close(weights[:, 2], torch.full((25,), 0.2))
    torch.testing.assert_close(weights[:, :2], 0.8 * tdw_weights(SIGMAS[:-1]))


def prompt_only(sigmas: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.zeros_like(sigmas), torch.ones_like(sigmas)], 1)


def wrong_shape(sigmas: torch.Tensor) -> torch.Tensor:
    return sigmas


def test_own_schedule_by_import_path() -> None:
    config = AdvantageConfig(schedule=CustomSchedule(target=f"{__name__}:prompt_only"))
    assert (objective_weights(SIGMAS[:-1], config, NAMES)[:, 1] == 1).all()
    bad = AdvantageConfig(schedule=CustomSchedule(target=f"{__name__}:wrong_shape"))
    with pytest.raises(ConfigError, match=r"must return a tensor of shape \(25, 2\)"):
        objective_weights(SIGMAS[:-1], bad, NAMES)


def test_share_statistics_count_signs() -> None:
    scores = torch.tensor([[1.0, 1], [1, -1], [-1, -1], [-1, 1.5]])
    groups = torch.zeros(4, dtype=torch.int64)
    result = assign_credit(scores, groups, SIGMAS, AdvantageConfig(), (IDENTITY, PROMPT), NAMES)
    shares = share_statistics(result, NAMES)
    assert shares["share/conflicted"] == 0.5
    assert shares["share/both_positive"] == shares["share/both_negative"] == 0.25
    assert share_statistics(result, ("identity", "quality")) == {}


def test_share_statistics_tell_which_objective_is_met() -> None:
    rows = torch.tensor([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    result = Advantages(per_objective=rows, per_step=rows, valid=torch.ones(5, dtype=torch.bool))
    shares = share_statistics(result, NAMES)
    assert shares["share/identity_only"] == pytest.approx(0.4)
    assert shares["share/prompt_only"] == pytest.approx(0.2)
    assert shares["share/conflicted"] == pytest.approx(0.6)
