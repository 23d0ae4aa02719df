import json
from dataclasses import asdict, replace

import pytest
import torch
from helpers import assert_near

from customized_grpo.config import (
    AdvantageConfig,
    ConstantSchedule,
    CosineSchedule,
    CustomSchedule,
    LinearSchedule,
    MeasuredSchedule,
)
from customized_grpo.errors import ConfigError
from customized_grpo.ops import (
    Shaping,
    group_normalize,
    shifted_sigmas,
    synergy_bonus,
    tdw_weights,
)
from customized_grpo.rewards.clip_text import ClipTextConfig
from customized_grpo.rewards.dinov2 import Dinov2Config
from customized_grpo.training.advantages import (
    Measured,
    assign_credit,
    gate_statistics,
    mean_levels,
    objective_advantages,
    objective_weights,
    raw_scores,
    share_statistics,
    shares_of_noise,
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


def on_the_cpu(sigmas: torch.Tensor) -> torch.Tensor:
    return torch.full((len(sigmas), 2), 0.5, dtype=torch.float64)


def test_own_schedule_comes_to_the_noise_levels() -> None:
    """As that of a function that makes CPU tensors, in a run on a GPU."""
    config = AdvantageConfig(schedule=CustomSchedule(target=f"{__name__}:on_the_cpu"))
    weights = objective_weights(SIGMAS[:-1].to("meta"), config, NAMES)
    assert (weights.device.type, weights.dtype) == ("meta", torch.float32)


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


REWARDS = (PROMPT, IDENTITY)  # in another order than the objectives
GATE = AdvantageConfig(shaping="gate", gamma=2.0)


def gated(scores: torch.Tensor, level: float) -> torch.Tensor:
    """Advantages by the formula, of scores (prompt, identity)."""
    penalty = 2.0 * (level - scores[:, 1:]).clamp(min=0).square()
    return group_normalize(scores[:, :1] - penalty, GROUPS).expand(8, 25)


def test_the_gate_compares_with_the_base_or_with_a_number(scores: torch.Tensor) -> None:
    base = Measured(levels=(0.3, 7.0))
    found = assign_credit(scores, GROUPS, SIGMAS, GATE, REWARDS, NAMES, base)
    torch.testing.assert_close(found.per_step, gated(scores, 0.3))
    number = replace(GATE, gate_floor=-0.2)
    found = assign_credit(scores, GROUPS, SIGMAS, number, REWARDS, NAMES, base)
    torch.testing.assert_close(found.per_step, gated(scores, -0.2))
    with pytest.raises(
        ConfigError, match=r"shaping gate needs the mean .* set advantage\.gate_floor"
    ):
        assign_credit(scores, GROUPS, SIGMAS, GATE, REWARDS, NAMES)


def test_the_gates_floor_and_who_is_below_it_are_logged(scores: torch.Tensor) -> None:
    scores[:, 1] = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, torch.nan])
    base = Measured(levels=mean_levels(scores, REWARDS))
    found = gate_statistics(scores, GATE, REWARDS, base)
    assert found == {"gate/floor": 3.0, "gate/below": pytest.approx(3 / 7)}
    assert gate_statistics(scores, AdvantageConfig(), REWARDS, base) == {}


def test_raw_scores_are_identity_and_prompt_by_the_rewards_weights(scores: torch.Tensor) -> None:
    three = torch.cat([scores, 10 * scores[:, :1]], 1)
    rewards = (replace(PROMPT, weight=3.0), IDENTITY, replace(PROMPT, name="second"))
    wanted = torch.stack([scores[:, 1], (3 * scores[:, 0] + 10 * scores[:, 0]) / 4], 1)
    torch.testing.assert_close(raw_scores(three, rewards), wanted)
    three[2, 0] = torch.nan
    assert raw_scores(three, rewards)[2].isnan().all()
    kept = [0, 1, 3, 4, 5, 6, 7]
    assert mean_levels(three, rewards) == pytest.approx(wanted[kept].mean(0).tolist())


def lowest(scores_BN: torch.Tensor, levels_N: torch.Tensor, gamma: float) -> torch.Tensor:
    return gamma * (scores_BN - levels_N).amin(1)


LOWEST = Shaping(score=lowest)


def test_a_shaping_of_ones_own_sees_raw_scores_and_the_base(scores: torch.Tensor) -> None:
    own = AdvantageConfig(shaping="custom", shaping_target=f"{__name__}:LOWEST", gamma=2.0)
    plain = AdvantageConfig(shaping="linear")
    base = Measured(levels=(0.5, -0.5))
    found = assign_credit(scores, GROUPS, SIGMAS, own, REWARDS, NAMES, base).per_step
    without = assign_credit(scores, GROUPS, SIGMAS, plain, REWARDS, NAMES).per_step
    score = (scores.flip(1) - torch.tensor([0.5, -0.5])).amin(1, keepdim=True)
    torch.testing.assert_close(found, without + group_normalize(score, GROUPS))


def test_measured_weights_are_those_of_the_rewards_shares() -> None:
    """Of two identity rewards, one weighing three times the other, and one for the prompt."""
    variances = torch.tensor([[1.0, 30.0, 8.0], [3.0, 10.0, 24.0], [0.0, 0.0, 0.0]])
    rewards = (IDENTITY, PROMPT, replace(IDENTITY, name="second", weight=3.0))
    shares = shares_of_noise(variances, rewards)
    assert shares[0] == pytest.approx((0.25, 0.75))
    assert shares[1] == pytest.approx((0.75, 0.25))
    config = AdvantageConfig(schedule=MeasuredSchedule(), extra_weights={"quality": 0.2})
    names = (*NAMES, "quality")
    found = objective_weights(SIGMAS[:3], config, names, Measured(noise_shares=shares))
    wanted = [[0.2, 0.6, 0.2], [0.6, 0.2, 0.2], [0.4, 0.4, 0.2]]
    torch.testing.assert_close(found, torch.tensor(wanted))
    uneven = shares_of_noise(torch.tensor([[1.0, 1.0, 3.0], [1.0, 3.0, 1.0]]), rewards)
    assert uneven[0] == pytest.approx(((0.5 + 3 * 0.75) / 4, 0.25))


def test_weights_that_nobody_measured_are_refused() -> None:
    config = AdvantageConfig(schedule=MeasuredSchedule())
    with pytest.raises(ConfigError, match="type must be another than measured where no run has"):
        objective_weights(SIGMAS[:-1], config, NAMES)


def test_what_was_measured_comes_back_from_json_bit_by_bit() -> None:
    variances = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    measured = Measured(
        levels=mean_levels(variances, REWARDS), noise_shares=shares_of_noise(variances, REWARDS)
    )
    assert Measured.of(json.loads(json.dumps(asdict(measured)))) == measured
    assert Measured.of({}) == Measured()
