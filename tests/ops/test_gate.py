"""Shapings that read raw scores: the identity gate, and one's own."""

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from customized_grpo.ops import Shaping, group_normalize, shape_advantages

GROUPS = torch.arange(4).repeat_interleave(5)
WEIGHTS = torch.tensor([[0.3, 0.7], [0.9, 0.1]])


@pytest.fixture
def scores() -> Tensor:
    """Identity around .5, prompt around 8 with three times the spread."""
    drawn = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    return torch.tensor([0.5, 8.0]) + torch.tensor([0.2, 0.6]) * drawn


def gate(scores: Tensor, level: float, gamma: float, **options: Any) -> Tensor:
    return shape_advantages(
        "gate",
        group_normalize(scores, GROUPS),
        WEIGHTS,
        gamma=gamma,
        group_ids=GROUPS,
        scores=scores,
        levels=torch.tensor([level, math.nan]),
        **options,
    )


@pytest.mark.parametrize(("level", "gamma"), [(0.45, 5.0), (0.7, 20.0), (9.0, 0.3)])
def test_it_is_the_formula_of_its_paper_at_every_step(
    scores: Tensor, level: float, gamma: float
) -> None:
    """Sample by sample and in double precision."""
    found = gate(scores, level, gamma)
    gated = []
    for identity, prompt in scores.double().tolist():
        shortfall = level - identity if identity < level else 0.0
        gated.append(prompt - gamma * shortfall**2)
    for b in range(20):
        group = gated[b // 5 * 5 : b // 5 * 5 + 5]
        wanted = (gated[b] - statistics.mean(group)) / statistics.stdev(group)
        assert found[b].tolist() == pytest.approx([wanted, wanted], rel=1e-5, abs=1e-5)


def test_above_the_floor_the_prompt_alone_counts(scores: Tensor) -> None:
    prompt = group_normalize(scores, GROUPS)[:, 1:]
    torch.testing.assert_close(gate(scores, -9.0, 5.0), prompt.expand(20, 2))


def test_below_it_identity_counts_the_more_the_further(scores: Tensor) -> None:
    """Of five pictures that are alike to the prompt."""
    scores = torch.tensor([[0.6, 1.0], [0.5, 1.0], [0.4, 1.0], [0.3, 1.0], [0.2, 1.0]])
    found = shape_advantages(
        "gate",
        group_normalize(scores, GROUPS[:5]),
        WEIGHTS,
        group_ids=GROUPS[:5],
        scores=scores,
        levels=torch.tensor([0.5, 0.0]),
    )[:, 0]
    assert found[0] == found[1]
    assert bool((found[1:].diff().diff() < -1e-3).all())


def test_a_picture_that_could_not_be_scored_is_no_part_of_its_group(scores: Tensor) -> None:
    whole = gate(scores, 0.5, 5.0)
    scores[7, 0] = math.nan
    found = gate(scores, 0.5, 5.0)
    assert found[7].tolist() == [0, 0]
    assert torch.equal(found[:5], whole[:5])
    kept = [5, 6, 8, 9]
    penalty = 5.0 * (0.5 - scores[kept, :1]).clamp(min=0).square()
    alone = group_normalize(scores[kept, 1:] - penalty, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(found[kept, :1], alone)


def test_its_clip_is_the_clip(scores: Tensor) -> None:
    assert gate(scores, 0.5, 5.0, clip=0.25).abs().max() == 0.25


def test_a_score_of_ones_own_is_added_to_the_weighted_sum(scores: Tensor) -> None:
    def below_the_base(scores_BN: Tensor, levels_N: Tensor, gamma: float) -> Tensor:
        return -gamma * (levels_N - scores_BN).clamp(min=0).sum(1)

    advantages = group_normalize(scores, GROUPS)
    options: dict[str, Any] = {"gamma": 0.4, "group_ids": GROUPS}
    raw: dict[str, Any] = {"scores": scores, "levels": scores.mean(0)}
    own = Shaping(score=below_the_base)
    plain = shape_advantages("linear", advantages, WEIGHTS, **options)
    found = shape_advantages(own, advantages, WEIGHTS, **options, **raw)
    added = group_normalize(below_the_base(scores, scores.mean(0), 0.4)[:, None], GROUPS)
    torch.testing.assert_close(found, (plain + added).clamp(-5, 5))
    assert (added.abs() > 0.1).any()
    alone = Shaping(score=below_the_base, weighted_sum=False)
    found = shape_advantages(alone, advantages, WEIGHTS, **options, **raw)
    torch.testing.assert_close(found, added.expand(20, 2))


@pytest.mark.parametrize("name", ["sars", "linear", "gdpo", "synergy_only", "harmonic"])
def test_raw_scores_are_nothing_to_the_others(scores: Tensor, name: str) -> None:
    advantages = group_normalize(scores, GROUPS)
    raw: dict[str, Any] = {"scores": scores, "levels": torch.zeros(2)}
    found = shape_advantages(name, advantages, WEIGHTS, group_ids=GROUPS, **raw)
    assert torch.equal(found, shape_advantages(name, advantages, WEIGHTS))


@pytest.mark.parametrize("missing", ["scores", "levels", "group_ids"])
def test_what_it_needs_is_named(scores: Tensor, missing: str) -> None:
    options: dict[str, Any] = {
        "scores": scores, "levels": torch.zeros(2), "group_ids": GROUPS, missing: None
    }  # fmt: skip
    with pytest.raises(ValueError, match="scores, levels and group_ids must be given for 'gate'"):
        shape_advantages("gate", group_normalize(scores, GROUPS), WEIGHTS, **options)
