"""Measures against oracles, and properties that must hold for any input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from customized_grpo.evaluation.measures import (
    diversity,
    frechet_distance,
    high_frequency_energy,
    hypervolume,
    joint_rates,
    standard_error,
)

UNIT = st.floats(0, 1, allow_nan=False)


def test_joint_rates_count_examples_better_or_worse_on_every_objective() -> None:
    base = torch.zeros(5, 2)
    tuned = torch.tensor([[1.0, 1], [1, -1], [-1, -1], [0, 1], [math.nan, 1]])
    domination, collapse = joint_rates(tuned, base)
    assert (domination, collapse) == (pytest.approx(1 / 5), pytest.approx(1 / 5))


def test_hypervolume_of_a_staircase() -> None:
    assert hypervolume([(0.5, 0.5)], (0, 0)) == 0.25
    assert hypervolume([(1, 2), (2, 1)], (0, 0)) == pytest.approx(3)
    assert hypervolume([(-1, 5), (5, -1)], (0, 0)) == 0


@given(st.lists(st.tuples(UNIT, UNIT), max_size=6))
def test_hypervolume_is_the_share_of_points_that_are_dominated(points) -> None:
    rng = np.random.default_rng(0)
    throws = rng.random((4000, 2))
    hit = np.zeros(len(throws), dtype=bool)
    for x, y in points:
        hit |= (throws[:, 0] < x) & (throws[:, 1] < y)
    assert hypervolume(points, (0, 0)) == pytest.approx(hit.mean(), abs=0.04)


@given(st.lists(st.tuples(UNIT, UNIT), min_size=1, max_size=5), st.tuples(UNIT, UNIT))
def test_another_point_never_lowers_the_hypervolume(points, new) -> None:
    assert hypervolume([*points, new], (0, 0)) >= hypervolume(points, (0, 0)) - 1e-12
    assert hypervolume(points[::-1], (0, 0)) == pytest.approx(hypervolume(points, (0, 0)))


def test_frechet_distance_equals_scipys_matrix_root() -> None:
    from scipy.linalg import sqrtm

    a = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    b = torch.randn(150, 6, dtype=torch.float64) + 1
    c1, c2 = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = np.trace(sqrtm(c1 @ c2).real)
    means = ((a.mean(0) - b.mean(0)) ** 2).sum().item()
    wanted = means + np.trace(c1) + np.trace(c2) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_high_frequencies_are_those_above_half_the_nyquist_frequency() -> None:
    x = torch.arange(64.0)
    slow, fast = (0.5 + 0.5 * torch.sin(2 * math.pi * k * x / 64) for k in (15, 17))
    images = torch.stack([wave.expand(3, 64, 64) for wave in (slow, fast)])
    low, high = high_frequency_energy(images).tolist()
    assert low < 1e-6
    assert high > 0.01
    grid = images[0].clone()
    grid[:, ::2, ::2] += 0.1
    assert high_frequency_energy(grid[None]) > 1e-4


def test_diversity_is_the_mean_distance_between_variants() -> None:
    features = torch.nn.functional.normalize(torch.randn(3, 5, 8), dim=-1)
    pairs = [(0, 1), (0, 2), (1, 2)]
    wanted = np.mean([[1 - (features[i, b] @ features[j, b]).item() for i, j in pairs]
                      for b in range(5)])  # fmt: skip
    assert diversity(features) == pytest.approx(wanted, abs=1e-6)
    assert diversity(features[:1].expand(4, -1, -1)) == pytest.approx(0, abs=1e-6)


def test_standard_error_leaves_out_what_does_not_apply() -> None:
    values = torch.tensor([1.0, 2.0, 4.0])
    assert standard_error(values) == pytest.approx(np.std([1, 2, 4], ddof=1) / 3**0.5)
    with_gap = torch.tensor([1.0, math.nan, 2.0, 4.0])
    assert standard_error(with_gap) == standard_error(values)
