"""Win rates within groups, against counting."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from customized_grpo.ops import win_rates


def slow_rate(scores: list[float], groups: list[int], row: int) -> float:
    mine = scores[row]
    others = [s for i, s in enumerate(scores) if i != row and groups[i] == groups[row] and s == s]
    if math.isnan(mine):
        return math.nan
    if not others:
        return 0.5
    return sum(1.0 if mine > s else 0.5 if mine == s else 0.0 for s in others) / len(others)


@settings(derandomize=True, max_examples=60)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 2.0, math.nan]), st.integers(0, 2)),
        min_size=1,
        max_size=9,
    )
)
def test_equals_counting(rows: list[tuple[float, int]]) -> None:
    scores, groups = [s for s, _ in rows], [g for _, g in rows]
    columns = torch.tensor([scores, [-s for s in scores]]).T
    found = win_rates(columns, torch.tensor(groups))
    expected = [[slow_rate(c, groups, i) for c in columns.T.tolist()] for i in range(len(rows))]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6, equal_nan=True)
    known = ~columns[:, 0].isnan()
    assert torch.allclose(found[known].sum(1), torch.ones(int(known.sum())))  # the mirror image


def test_a_label_is_missing() -> None:
    unchecked = inspect.unwrap(win_rates)  # as without jaxtyping's checks, which the tests have
    with pytest.raises(ValueError, match="group_ids"):
        unchecked(torch.zeros(3, 1), torch.zeros(2, dtype=torch.int64))
