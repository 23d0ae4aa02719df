"""Factors that balance gradients: against a slow search, and what the shortest mix must be."""

import inspect
import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from customized_grpo.ops import BalanceMethod, balanced_factors

PROPERTY = settings(derandomize=True, max_examples=30)
seeds = st.integers(0, 2**31 - 1)


def made(seed: int, count: int, width: int = 5, scale: float = 1.0) -> Tensor:
    """Gradients of lengths of several orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return scale * gradients * 10 ** torch.randn(count, 1, generator=generator)


def slow_shares(gradients: list[list[float]]) -> list[float]:
    """The shortest mix, by moving weight between two gradients until nothing gets shorter."""

    def dot(a: list[float], b: list[float]) -> float:
        return math.fsum(x * y for x, y in zip(a, b, strict=True))

    shares = [1 / len(gradients)] * len(gradients)
    for _ in range(4000):
        for i, j in permutations(range(len(gradients)), 2):
            mix = [math.fsum(s * g[k] for s, g in zip(shares, gradients, strict=True))
                   for k in range(len(gradients[0]))]  # fmt: skip
            way = [a - b for a, b in zip(gradients[i], gradients[j], strict=True)]
            moved = max(-shares[i], min(shares[j], -dot(mix, way) / dot(way, way)))
            shares[i], shares[j] = shares[i] + moved, shares[j] - moved
    return shares


@PROPERTY
@given(seed=seeds, method=st.sampled_from(["mgda", "marble"]))
def test_two_are_balanced_as_by_a_grid_of_mixes(seed: int, method: BalanceMethod) -> None:
    gradients = made(seed, 2, scale=1e-4)
    lengths = gradients.norm(dim=1)
    used = gradients / lengths[:, None] if method == "marble" else gradients
    low, high = 0.0, 1.0
    for _ in range(40):  # ever finer grids around the best
        grid = torch.linspace(low, high, 11, dtype=torch.float64)
        mixes = grid[:, None] * used[0] + (1 - grid[:, None]) * used[1]
        best = int(mixes.square().sum(1).argmin())
        low, high = grid[max(best - 1, 0)].item(), grid[min(best + 1, 10)].item()
    shares = torch.tensor([low, 1 - low], dtype=torch.float64)
    shares = shares / lengths if method == "marble" else shares
    found = balanced_factors(gradients @ gradients.T, method)
    torch.testing.assert_close(found, shares / shares.mean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_many_are_balanced_as_by_a_slow_search(seed: int, count: int) -> None:
    """In three dimensions four gradients may cancel out, three may not."""
    gradients = made(seed, count, width=3)
    used = gradients / gradients.norm(dim=1, keepdim=True)
    shares = torch.tensor(slow_shares(used.tolist()), dtype=torch.float64)
    found = balanced_factors(gradients @ gradients.T, "marble") * gradients.norm(dim=1)
    mix, slow = (s / s.sum() @ used for s in (found, shares))
    torch.testing.assert_close(mix, slow, atol=1e-5, rtol=0)
    if count == 3:  # else the mix of length 0 may be made in several ways
        torch.testing.assert_close(found / found.sum(), shares, atol=1e-5, rtol=0)


@PROPERTY
@given(seed=seeds, count=st.integers(2, 5), method=st.sampled_from(["mgda", "marble"]))
def test_a_step_along_the_mix_makes_none_worse(
    seed: int, count: int, method: BalanceMethod
) -> None:
    gradients = made(seed, count, width=8)
    factors = balanced_factors(gradients @ gradients.T, method)
    assert (factors >= 0).all()
    assert factors.mean().item() == pytest.approx(1)
    step = factors @ gradients
    unit = gradients / gradients.norm(dim=1, keepdim=True)
    assert (unit @ step / step.norm() > -1e-6).all()


def test_two_in_closed_form() -> None:
    one, other = torch.tensor([3.0, 0.0]), torch.tensor([0.5, 1.0])
    gradients = torch.stack([one, other])
    share = ((other @ other - one @ other) / (one - other).square().sum()).clamp(0, 1)
    expected = 2 * torch.stack([share, 1 - share]).double()
    torch.testing.assert_close(balanced_factors(gradients @ gradients.T, "mgda"), expected)


def test_mgda_may_leave_the_longer_one_out_and_marble_never_does() -> None:
    gradients = torch.tensor([[1.0, 0.0], [10.0, 1.0]])
    gram = gradients @ gradients.T
    assert balanced_factors(gram, "mgda").tolist() == [2, 0]
    factors = balanced_factors(gram, "marble")
    assert (factors[0] / factors[1]).item() == pytest.approx(101**0.5)


@pytest.mark.parametrize("method", ["mgda", "marble"])
@pytest.mark.parametrize(
    "gradients",
    [[[1.0, 2.0], [1.0, 2.0]], [[1.0, 0.0], [-1.0, 0.0]], [[0.0, 0.0], [3.0, 4.0]],
     [[0.0, 0.0], [0.0, 0.0]]],
    ids=["equal", "opposite", "one is nothing", "both are nothing"],
)  # fmt: skip
def test_where_there_is_no_better_mix_all_keep_1(
    gradients: list[list[float]], method: BalanceMethod
) -> None:
    found = torch.tensor(gradients)
    torch.testing.assert_close(
        balanced_factors(found @ found.T, method), torch.ones(2, dtype=torch.float64)
    )


def test_the_size_of_all_gradients_does_not_matter() -> None:
    gram = torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    for scale in (1e-16, 1e8):
        torch.testing.assert_close(
            balanced_factors(scale * gram, "mgda"), balanced_factors(gram, "mgda")
        )


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="method must be one of mgda, marble, got 'sum'"):
        inspect.unwrap(balanced_factors)(torch.eye(2), "sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gram must be square and finite"):
        balanced_factors(torch.full((2, 2), torch.nan), "mgda")
