"""Every interval against numpy or a table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from customized_grpo.evaluation import statistics
from customized_grpo.evaluation.statistics import over_seeds, standard_error

NAN = math.nan


def test_interval_is_students() -> None:
    interval = over_seeds([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.3027, standard error 1 / sqrt(3): any table of Student's t.
    assert interval.mean == pytest.approx(2)
    assert interval.half_width == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert not interval.excludes_zero
    assert over_seeds([1.0, 1.1, 1.2]).excludes_zero
    assert over_seeds([-1.0, -1.1, -1.2]).excludes_zero


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
