"""Every interval against numpy or a table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from customized_grpo.evaluation import statistics
from customized_grpo.evaluation.statistics import over_seeds
from customized_grpo.ops.significance import standard_error

NAN = math.nan


def test_interval_is_students() -> None:
    interval = over_seeds([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.3027, standard error 1 / sqrt(3): any table of Student's t.
    assert interval.mean == pytest.approx(2)
    assert interval.half_width == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert not interval.excludes_zero
    assert over_seeds([1.0, 1.1, 1.2]).excludes_zero
    assert over_seeds([-1.0, -1.1, -1.2]).excludes_zero


def test_intervals_that_hold_at_once_are_wider() -> None:
    """Of five, .5 % on either side: 9.925 by Student's t with two degrees of freedom, where one has
    4.303; of examples, by the normal distribution, 2.576 and 1.960."""
    one, five = (over_seeds([1.0, 2.0, 3.0], comparisons=count).half_width for count in (1, 5))
    assert five / one == pytest.approx(9.925 / 4.303, abs=1e-3)
    examples = over_seeds([0.5], examples=0.2, comparisons=5).half_width
    assert examples == pytest.approx(0.2 * 2.576 / 1.960, abs=1e-4)


def test_standard_error_leaves_out_what_does_not_apply() -> None:
    values = torch.tensor([1.0, 2.0, 4.0])
    assert standard_error(values) == pytest.approx(np.std([1, 2, 4], ddof=1) / 3**0.5)
    with_gap = torch.tensor([1.0, math.nan, 2.0, 4.0])
    assert standard_error(with_gap) == standard_error(values)


def test_the_interval_is_numpy_s_bootstrap_over_subjects() -> None:
    values = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.8, NAN, 0.4], dtype=torch.float64)
    subjects = ["a", "a", "a", "b", "b", "b", "c"]
    found = statistics.over_subjects(values, subjects)
    assert found is not None
    assert (found.count, found.subjects) == (6, 3)
    groups = [np.array([0.1, 0.2, 0.3]), np.array([0.9, 0.8]), np.array([0.4])]
    random = torch.Generator().manual_seed(0)
    drawn = torch.randint(3, (statistics.RESAMPLES, 3), generator=random).numpy()
    means = [np.concatenate([groups[s] for s in row]).mean() for row in drawn]
    assert found.mean == pytest.approx(np.concatenate(groups).mean())
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=1e-9)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=1e-9)


def test_many_pictures_of_few_subjects_do_not_make_it_sure() -> None:
    """What a bootstrap over pictures gets wrong."""
    subjects = ["a", "b", "c"]
    few = statistics.over_subjects(torch.tensor([0.0, 0.5, 1.0]), subjects)
    many = statistics.over_subjects(torch.tensor([0.0, 0.5, 1.0]).repeat(100), subjects * 100)
    assert few
    assert many
    assert (few.low, few.high) == (many.low, many.high)


def test_one_seed_or_subject_has_no_interval_and_no_numbers_no_estimate() -> None:
    assert over_seeds([0.5]).plus_minus() == "0.5000"
    assert not over_seeds([0.5]).excludes_zero
    found = statistics.over_subjects(torch.tensor([0.1, 0.3]), ["a", "a"])
    assert found
    assert (found.low, found.high, found.in_brackets()) == (None, None, "0.200")
    assert statistics.over_subjects(torch.tensor([NAN]), ["a"]) is None


def test_examples_are_folded_in_and_two_seeds_are_never_clear() -> None:
    alike = over_seeds([0.062, 0.062])  # by chance
    assert not alike.is_clear(3)
    assert not over_seeds([0.062] * 3).is_clear(3)  # no width
    assert not over_seeds([0.0620, 0.0621, 0.0622]).is_clear(3)  # none that is printed
    assert over_seeds([0.062] * 3, examples=0.01).is_clear(3)
    assert not over_seeds([0.062] * 3, examples=0.07).is_clear(3)
    assert not over_seeds([0.062, 0.062], examples=0.01).is_clear(3)
    assert not over_seeds([0.0053, 0.0052, 0.0054, 0.0053], examples=0.00527).is_clear(4)
    both = over_seeds([1.0, 2.0, 3.0], examples=3.0)
    seeds = over_seeds([1.0, 2.0, 3.0]).half_width
    assert both.half_width == pytest.approx(math.hypot(seeds, 3.0))
    alone = over_seeds([0.5], examples=0.2)
    assert alone.plus_minus(2) == "0.50 ± 0.20"
    assert not alone.is_clear(2)


def test_an_interval_of_a_share_ends_where_shares_end() -> None:
    wide = over_seeds([0.1, 0.3]).within(0, 1)
    assert (wide.low, wide.high) == (0, 1)
    assert wide.plus_minus(3) == "0.200 [0.000, 1.000]"  # ± would say less than nothing
    assert over_seeds([0.5, 0.52]).within(0, 1).plus_minus(2) == "0.51 ± 0.13"
    assert over_seeds([0.5]).within(0, 1).low is None


def test_nothing_is_minus_zero() -> None:
    assert over_seeds([-0.00001]).plus_minus(4) == "0.0000"
    assert over_seeds([-0.00001]).in_brackets(sign=True) == "+0.000"
