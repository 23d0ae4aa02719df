"""How much each objective counts, by the gradients of all: MGDA, and MARBLE's form of it."""

from collections.abc import Iterator
from itertools import combinations
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

BalanceMethod = Literal["mgda", "marble"]
"""Whether gradients are balanced with their lengths, or without; see `balanced_factors`."""

_TIE = 1e-9  # of the largest square: what is not told apart from float rounding of the products


def balanced_factors(
    gram: Float[Tensor, "objectives objectives"], method: BalanceMethod
) -> Float64[Tensor, " objectives"]:
    """Returns a factor per objective, so that their gradients together are one step for all.

    Of all mixes `sum_n a_n g_n` with `a_n >= 0` and `sum_n a_n = 1` the shortest has the same inner
    product with every gradient that has a share, and none smaller with the others: if it is not 0,
    a step along it improves all (Desideri 2012; Sener and Koltun, arXiv:1810.04650). For two

    `a_1 = clip((|g_2|^2 - g_1 g_2) / |g_1 - g_2|^2, 0, 1)`.

    - `mgda`: the factors are a. The shorter gradient gets the larger share, up to all of it.
    - `marble` (MARBLE, arXiv:2605.06507): the gradients are made equally long first, so that no
      objective leads by its size; the factor is `a_n / |g_n|`. For two objectives a is then one
      half whatever the angle: the mix bisects it.

    Args:
        gram: `[N, N]` inner products `g_m g_n`, finite.
        method: one of the two.

    Returns:
        `[N]` float64, not negative, of mean 1, so that the learning rate keeps its meaning. An
        objective without a gradient has nothing to balance: it keeps 1.

    Raises:
        ValueError: if `gram` is not square and finite, or the method is unknown.

    Example:
        A long gradient and a short one, at a right angle:

        >>> gram = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
        >>> balanced_factors(gram, "mgda")
        tensor([0.4000, 1.6000], dtype=torch.float64)
        >>> balanced_factors(gram, "marble")
        tensor([0.6667, 1.3333], dtype=torch.float64)
    """
    if method not in get_args(BalanceMethod):
        raise ValueError(
            f"method must be one of {', '.join(get_args(BalanceMethod))}, got {method!r}; "
            "check the spelling."
        )
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not bool(gram.isfinite().all()):
        raise ValueError(
            f"gram must be square and finite, got {gram.tolist()}; pass the gradients' products."
        )
    products = gram.detach().double().cpu()
    lengths = products.diagonal().clamp(min=0.0).sqrt()
    moving = (lengths > 0).nonzero()[:, 0]
    factors = torch.ones_like(lengths)
    if not len(moving):
        return factors
    scale = 1.0 / lengths[moving] if method == "marble" else torch.ones_like(lengths[moving])
    shares = scale * _shortest_mix(products[moving][:, moving] * scale[:, None] * scale)
    factors[moving] = shares / shares.mean()
    return factors


def _shortest_mix(gram: Tensor) -> Tensor:
    """The convex weights of the shortest mix: the best of those of all sets of gradients.

    Equally good ones of more gradients come first: equal gradients get equal shares.
    """
    best, least = gram.new_full((len(gram),), 1.0 / len(gram)), torch.inf
    for members in _subsets(len(gram)):
        weights = torch.zeros_like(best)
        weights[members] = _stationary(gram[members][:, members])
        length = (weights @ gram @ weights).item()
        if bool((weights >= -_TIE).all()) and length < least - _TIE * gram.diagonal().max().item():
            best, least = weights.clamp(min=0.0), length
    return best


def _subsets(count: int) -> Iterator[list[int]]:
    for size in range(count, 0, -1):
        yield from map(list, combinations(range(count), size))


def _stationary(gram: Tensor) -> Tensor:
    """Weights of sum 1, of any sign, of which the mix is as short as it can be."""
    count = len(gram)
    system = gram.new_zeros(count + 1, count + 1)
    size = gram.diagonal().max()  # gradients may be tiny; the constraint beside them is not
    system[:count, :count], system[:count, count], system[count, :count] = gram / size, 1.0, 1.0
    target = gram.new_zeros(count + 1)
    target[count] = 1.0
    return (torch.linalg.pinv(system, hermitian=True) @ target)[:count]
