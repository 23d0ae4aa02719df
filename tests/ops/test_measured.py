"""Weights by what the noise of each step moves."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from customized_grpo.ops import measured_weights, noise_variance

SEEDS = st.integers(0, 2**31 - 1)
PROPERTY = settings(derandomize=True, max_examples=40)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_variance_is_that_within_groups() -> None:
    scores = torch.randn(12, 2, generator=seeded(0)) + torch.arange(3).repeat_interleave(4)[:, None]
    scores[1, 1] = math.nan  # one less in its group
    scores[4:7, 1] = math.nan  # a group of one, which has no variance
    order = torch.randperm(12, generator=seeded(1))
    found = noise_variance(scores[order], torch.arange(3).repeat_interleave(4)[order])
    for reward in range(2):
        groups = [scores[i : i + 4, reward].double().tolist() for i in (0, 4, 8)]
        known = [[value for value in group if not math.isnan(value)] for group in groups]
        wanted = statistics.mean(statistics.variance(group) for group in known if len(group) > 1)
        assert found[reward].item() == pytest.approx(wanted, rel=1e-5)


def test_the_variance_of_equal_scores_is_0_and_of_none_unknown() -> None:
    third = torch.tensor([1.0]) / 3
    scores = torch.stack([third + 1e-8, third, third, third]) * torch.tensor([[1.0, math.nan]])
    assert noise_variance(scores, torch.zeros(4, dtype=torch.int64)).tolist()[0] == 0
    assert noise_variance(scores, torch.zeros(4, dtype=torch.int64)).isnan().tolist() == [
        False,
        True,
    ]


@PROPERTY
@given(seed=SEEDS, steps=st.integers(1, 12))
def test_the_weights_equal_a_slow_loop(seed: int, steps: int) -> None:
    moved = torch.rand(steps, 2, generator=seeded(seed)) * torch.tensor([1.0, 1e-4])
    found = measured_weights(moved)
    rows = moved.double().tolist()
    for k, row in enumerate(rows):
        shares = [row[n] / sum(other[n] for other in rows) for n in range(2)]
        wanted = [share / sum(shares) for share in shares]
        assert found[k].tolist() == pytest.approx(wanted, rel=1e-5)


@PROPERTY
@given(seed=SEEDS)
def test_both_objectives_keep_the_same_part_and_at_least_a_half(seed: int) -> None:
    moved = torch.rand(5, 2, generator=seeded(seed)).square()
    shares = moved / moved.sum(0)
    kept = (measured_weights(moved) * shares).sum(0)
    assert kept[0].item() == pytest.approx(kept[1].item(), rel=1e-4)
    assert kept[0].item() >= 0.5 - 1e-5


def test_the_weights_are_wieners_where_the_parts_of_a_score_add_up() -> None:
    """Rewards that are sums of what each step's noise did: the best factors on them, by least
    squares on what a step has done, are the shares, in whose ratio the weights are."""
    scale = torch.tensor([[2.0, 0.5], [1.0, 1.0], [0.5, 2.0]])  # std of steps by objectives
    parts = torch.randn(200_000, 3, 2, generator=seeded(0)) * scale
    scores = parts.sum(1)
    best = (parts * scores[:, None]).mean(0) / scores.square().mean(0)
    wanted = best / best.sum(1, keepdim=True)
    torch.testing.assert_close(measured_weights(scale.square()), wanted, atol=0.01, rtol=0)


def test_what_is_moved_nowhere_says_nothing() -> None:
    dead = measured_weights(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    torch.testing.assert_close(dead, torch.tensor([[1 / 3, 2 / 3], [0.6, 0.4]]))
    silent = measured_weights(torch.tensor([[1.0, 4.0], [0.0, 0.0]]))
    assert silent.tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_bad_numbers_are_named(bad: float) -> None:
    with pytest.raises(ValueError, match="moved must be finite and not negative"):
        measured_weights(torch.tensor([[1.0, bad]]))
