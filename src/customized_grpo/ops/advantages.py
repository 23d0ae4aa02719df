"""Rewards to advantages: group normalisation, SARS and other shapings.

Legend of axis suffixes: B samples (all groups), P prompts (groups), R rewards, N objectives,
K steps.

An unscorable image has score NaN. It never enters a statistic of its own reward, it stays NaN
through `group_normalize` and `synergy_bonus` (so a forgotten mask shows as NaN in the logs, not as
a mean that is a little off), and `combine_advantages` / `shape_advantages`, the last step, turn
every sample with a NaN in any objective into advantage 0, no gradient. The caller keeps
`valid = ~per_objective.isnan().any(dim=1)`, and may set all rewards of such a sample to NaN first,
as the trainer does, so that it enters no statistic at all.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from types import MappingProxyType

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.nn import functional as F

from customized_grpo.ops.sde import Real

# About eight float32 roundings of the largest score: what reduction order alone can change.
_TIE_TOLERANCE = 1e-6


def group_normalize(
    scores: Float[Tensor, "batch rewards"], group_ids: Int64[Tensor, " batch"], eps: Real = 1e-8
) -> Float32[Tensor, "batch rewards"]:
    """Normalises every reward within its group (GRPO, arXiv:2402.03300).

    `A = (r - mean) / (std + eps)` with the unbiased std of the group's scored samples.

    A group in which a reward is the same for all samples up to float noise (std at most 1e-6 of the
    largest magnitude), or has a single scored sample, carries no information: its advantages are
    exactly 0, not noise divided by eps.

    Args:
        scores: `[B, R]`, NaN where an image could not be scored.
        group_ids: `[B]` int64 labels, any values in any order; equal labels form a group.
        eps: added to the std.

    Returns:
        `[B, R]` float32. NaN stays NaN and is excluded from the statistics of its group and reward.

    Raises:
        ValueError: if a score is infinite, or `group_ids` does not have one label per row of
            `scores`.

    Example:
        An image that cannot be scored and a group without differences:

        >>> scores = torch.tensor([[0.2], [0.6], [float("nan")], [9.0], [9.0]])
        >>> group_normalize(scores, torch.tensor([0, 0, 0, 1, 1])).T
        tensor([[-0.7071,  0.7071,     nan,  0.0000,  0.0000]])
    """
    _check_group_ids(group_ids, scores)
    scores_BR = scores.float()
    if bool(scores_BR.isinf().any()):
        where = scores_BR.isinf().nonzero()[0].tolist()
        raise ValueError(
            f"scores must be finite, got an infinity at [sample, reward] = {where}; "
            "score an image that cannot be scored as NaN."
        )
    index_B, members_PBR = _split_groups(scores_BR, group_ids)
    mean_PR, std_PR, tied_PR = _spread(members_PBR)
    advantages_BR = (scores_BR - mean_PR[index_B]) / (std_PR[index_B] + eps)
    return advantages_BR.masked_fill(tied_PR[index_B] & ~scores_BR.isnan(), 0.0)


def win_rates(
    scores: Float[Tensor, "batch rewards"], group_ids: Int64[Tensor, " batch"]
) -> Float32[Tensor, "batch rewards"]:
    """Returns the share of its group's other samples that a sample beats, equal ones counting half.

    So scores of different models compare, after GARDO (arXiv:2512.24138), where a sample with a
    higher win rate by the reward than by other models is suspected of hacking.

    Args:
        scores: `[B, R]`, NaN where an image could not be scored.
        group_ids: as in `group_normalize`.

    Returns:
        `[B, R]` float32 in [0, 1]. NaN stays NaN and is nobody's rival; 0.5 without rivals.

    Raises:
        ValueError: if `group_ids` does not have one label per row of `scores`.

    Example:
        >>> win_rates(torch.tensor([[0.2], [0.6], [0.6]]), torch.tensor([0, 0, 0])).T
        tensor([[0.0000, 0.7500, 0.7500]])
    """
    _check_group_ids(group_ids, scores)
    rates_BR = torch.empty_like(scores, dtype=torch.float32)
    for group in group_ids.unique():
        rows = (group_ids == group).nonzero()[:, 0]
        mine, rival = scores[rows].float()[:, None], scores[rows].float()[None]  # [G, G, R]
        won = (mine > rival).float() + 0.5 * (mine == rival)
        rivals = (~rival.isnan()).sum(1) - 1
        beaten = won.sum(1) - 0.5  # less the draw with itself
        rates = torch.where(rivals > 0, beaten / rivals.clamp(min=1), 0.5)
        rates_BR[rows] = rates.masked_fill(scores[rows].isnan(), math.nan)
    return rates_BR


def noise_variance(
    scores: Float[Tensor, "batch rewards"], group_ids: Int64[Tensor, " batch"]
) -> Float32[Tensor, " rewards"]:
    """Returns the variance of every reward within a group, the mean over the groups.

    Of groups whose samples share everything but the noise of one denoising step it is what chance
    at that step does to the reward, and so all that a policy gradient can credit the step with: see
    `measured_weights`.

    Args:
        scores: `[B, R]`, NaN where an image could not be scored.
        group_ids: `[B]` int64 labels; equal labels form a group.

    Returns:
        `[R]` float32, unbiased. A group that is tied (see `group_normalize`) counts as 0, one with
        less than two scored samples not at all; NaN if none is left.

    Raises:
        ValueError: if `group_ids` does not have one label per row of `scores`.

    Example:
        >>> noise_variance(torch.tensor([[1.0], [3.0], [5.0], [5.0]]), torch.tensor([0, 0, 1, 1]))
        tensor([1.0000])
    """
    _check_group_ids(group_ids, scores)
    _, members_PBR = _split_groups(scores.float(), group_ids)
    _, std_PR, tied_PR = _spread(members_PBR)
    alone_PR = (~members_PBR.isnan()).sum(dim=1) < 2
    return std_PR.square().masked_fill(tied_PR, 0.0).masked_fill(alone_PR, math.nan).nanmean(dim=0)


def synergy_bonus(
    advantages: Float[Tensor, "batch objectives"],
    gamma: Real = 0.4,
    center: bool = False,
    group_ids: Int64[Tensor, " batch"] | None = None,
) -> Float32[Tensor, " batch"]:
    """Returns the Synergy-Aware Reward Shaping (SARS) bonus of Customized-GRPO (arXiv:2510.18263).

    `S = gamma tanh(|A_i A_j|) (+1 if A_i > 0 and A_j > 0 else -1)`: both objectives good is
    amplified, conflicted or both bad is pushed down. More than two objectives: the mean over the
    pairs (i, j). The mean of S is below 0 (about -0.21 gamma for independent Gaussian advantages);
    `center` takes it off, group by group.

    Args:
        advantages: `[B, N]` group-normalised, N >= 2.
        gamma: strength, not negative; 0.4 in the released recipe.
        center: subtract the group mean of S over the valid samples (off in the paper).
        group_ids: `[B]` int64; needed by, and only read for, `center`.

    Returns:
        `[B]` float32 in `[-gamma, gamma]` before centring; NaN for a sample with a NaN objective.

    Raises:
        ValueError: if N < 2, `gamma` is negative, or `center` is set without `group_ids`.

    Example:
        Good at both, conflicted, bad at both:

        >>> synergy_bonus(torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]), gamma=0.4)
        tensor([ 0.3046, -0.3046, -0.3046])
    """
    return shaping_bonus("sars", advantages, gamma=gamma, center=center, group_ids=group_ids)


def combine_advantages(
    per_objective: Float[Tensor, "batch objectives"],
    synergy: Float[Tensor, " batch"] | None,
    weights: Float[Tensor, "steps objectives"],
    clip: Real = 5.0,
) -> Float32[Tensor, "batch steps"]:
    """Returns the total advantage of every sample at every step given (arXiv:2510.18263).

    `A[b, k] = clip(sum_n w[k, n] A[b, n] + S[b], -clip, clip)`. With `synergy_bonus` it is what
    `shape_advantages("sars", ...)`, which the trainer calls, gives in one go.

    Args:
        per_objective: `[B, N]`; a row with a NaN is an invalid sample.
        synergy: `[B]` bonus, or None for none.
        weights: `[K, N]` weight of every objective at every step.
        clip: bound on the absolute advantage, positive.

    Returns:
        `[B, K]` float32. Invalid samples get exactly 0 at every step. A NaN in `synergy` of a valid
        sample is a caller's mistake and stays NaN.

    Raises:
        ValueError: if `weights` does not have one column per objective, or `clip` is not positive.

    Example:
        A good identity and a bad prompt, at a step for the prompt and at one for the identity:

        >>> weights = torch.tensor([[0.3, 0.7], [0.7, 0.3]])
        >>> combine_advantages(torch.tensor([[1.0, -1.0]]), None, weights)
        tensor([[-0.4000,  0.4000]])
    """
    return _bounded(_weighted_total(per_objective, synergy, weights), per_objective, clip)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaping:
    """How the objectives' advantages become one: their weighted sum, what is added to it, and
    whether the sum is whitened."""

    bonus: Callable[[Tensor, Real], Tensor] | None = None
    """`(advantages [B, N], gamma) -> [B]`, added to the weighted sum; must map a NaN row to NaN."""

    score: Callable[[Tensor, Tensor, Real], Tensor] | None = None
    """`(raw scores [B, N], levels [N], gamma) -> [B]`, one score of the whole sample in the units
    of the rewards, for what has to know how good a sample is and not only how it compares with its
    group. It is normalised in its group and added; must map a NaN row to NaN."""

    weighted_sum: bool = True
    """False drops the weighted sum, so that bonus and score alone are the advantage."""

    whiten: bool = False
    """Normalise the sum over the whole batch, separately for every step, before it is clipped."""

    def __post_init__(self) -> None:
        if self.bonus is None and self.score is None and not self.weighted_sum:
            raise ValueError(
                "bonus or score must be given when weighted_sum is False, got None; nothing would "
                "be left."
            )


def shaping_bonus(
    shaping: str | Shaping,
    advantages: Float[Tensor, "batch objectives"],
    *,
    gamma: Real = 0.4,
    center: bool = False,
    group_ids: Int64[Tensor, " batch"] | None = None,
) -> Float32[Tensor, " batch"]:
    """Returns the bonus S a shaping adds to the weighted sum; zeros if there is none.

    Args:
        shaping: a name from `SHAPINGS`, or a `Shaping` of your own.
        advantages: `[B, N]` group-normalised.
        gamma: strength of the bonus, not negative; shapings without a bonus do not read it.
        center: subtract the group mean of the bonus over the valid samples. Not advisable for
            `harmonic`, where one sample near its pole (a + b = 0) would move its whole group.
        group_ids: `[B]` int64; needed by, and only read for, `center`.

    Returns:
        `[B]` float32; NaN for a sample with a NaN objective where the shaping has a bonus.

    Raises:
        ValueError: if the shaping is unknown, `gamma` is negative, the bonus needs two objectives
            and gets one, or `center` is set without `group_ids` or for a shaping without a bonus.

    Example:
        >>> shaping_bonus("min", torch.tensor([[2.0, -1.0], [2.0, 1.0]]), gamma=0.5)
        tensor([-0.5000,  0.5000])
    """
    bonus = _resolve(shaping).bonus
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, got {gamma}; use 0 for no bonus.")
    _check_rows("advantages", advantages)
    if bonus is None:
        if center:
            raise ValueError(
                f"center must be False for {shaping!r}, got True; it has no bonus to centre."
            )
        return torch.zeros(advantages.shape[0], device=advantages.device)
    bonus_B = bonus(advantages.float(), gamma)
    if not center:
        return bonus_B
    if group_ids is None:
        raise ValueError(
            "group_ids must be given when center is True, got None; pass the batch's group labels."
        )
    _check_group_ids(group_ids, advantages)
    index_B, members_PB1 = _split_groups(bonus_B[:, None], group_ids)
    return bonus_B - members_PB1.nanmean(dim=1)[index_B, 0]


def shape_advantages(
    shaping: str | Shaping,
    advantages: Float[Tensor, "batch objectives"],
    weights: Float[Tensor, "steps objectives"],
    *,
    gamma: Real = 0.4,
    center: bool = False,
    group_ids: Int64[Tensor, " batch"] | None = None,
    clip: Real = 5.0,
    scores: Float[Tensor, "batch objectives"] | None = None,
    levels: Float[Tensor, " objectives"] | None = None,
) -> Float32[Tensor, "batch steps"]:
    """Returns the advantage of every sample at every step under a named shaping.

    `A[b, k] = clip(sum_n w[k, n] A[b, n] + S[b], -clip, clip)` with a bonus S that the name
    selects. Pair terms are averaged over all pairs of objectives; a, b are the pair's advantages:

    - `sars`: `gamma tanh(|a b|) (+1 if a > 0 and b > 0 else -1)` (arXiv:2510.18263).
    - `linear`: no bonus, naive GRPO on the weighted sum.
    - `min`, `max`: `gamma min(a, b)`, `gamma max(a, b)`.
    - `harmonic`: `gamma a b / (a + b + 1e-6)`, as the paper writes it. It has a pole at a + b = 0
      that conflicted samples do come near; nothing but the final clip bounds it there.
    - `product`: `gamma softplus(a) softplus(b)`.
    - `synergy_only`: the SARS bonus without the weighted sum; the same at every step.
    - `gdpo` (arXiv:2601.05242): no bonus; the weighted sum of the separately normalised rewards is
      whitened over all valid samples of the batch, step by step, before the clip. In a distributed
      run pass the gathered batch.
    - `gate` (DivRL, arXiv:2606.23950): no weighted sum, but the group-normalised prompt score less
      a penalty for an identity below its level, `r_prompt - gamma max(0, level - r_identity)^2`;
      the same at every step. Identity above the level earns nothing.

    Args:
        shaping: a name from `SHAPINGS`, or a `Shaping` of your own.
        advantages: `[B, N]` from `group_normalize`; a row with a NaN is an invalid sample.
        weights: `[K, N]` from a schedule such as `tdw_weights`.
        gamma: strength of the bonus, not negative; or of the penalty of `gate`, in whose units the
            rewards count (`advantage.gamma` of a config is 5 there).
        center: subtract the group mean of the bonus (see `shaping_bonus`).
        group_ids: `[B]` int64; needed by, and only read for, `center` and a shaping with a score.
        clip: bound on the absolute advantage, positive.
        scores: `[B, N]` raw, in the units of the rewards, columns identity, prompt, then further
            objectives; needed by, and only read for, a shaping with a score.
        levels: `[N]` in the same units, such as the base's means; as `scores`.

    Returns:
        `[B, K]` float32; exactly 0 for invalid samples.

    Raises:
        ValueError: as `shaping_bonus` and `combine_advantages`, and for a shaping with a score
            without `scores`, `levels` or `group_ids`.

    Example:
        Good at both and conflicted, without and with the bonus of the paper:

        >>> advantages, half = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[0.5, 0.5]])
        >>> shape_advantages("linear", advantages, half).T
        tensor([[1., 0.]])
        >>> shape_advantages("sars", advantages, half).T
        tensor([[ 1.3046, -0.3046]])
    """
    recipe = _resolve(shaping)
    bonus_B = shaping_bonus(shaping, advantages, gamma=gamma, center=center, group_ids=group_ids)
    used_weights = weights if recipe.weighted_sum else torch.zeros_like(weights)
    total_BK = _weighted_total(advantages, bonus_B, used_weights)
    if recipe.score is not None:
        if scores is None or levels is None or group_ids is None:
            raise ValueError(
                f"scores, levels and group_ids must be given for {shaping!r}, got None; it reads "
                "raw scores."
            )
        valid_BN = scores.float().masked_fill(advantages.isnan().any(1, keepdim=True), math.nan)
        score_B1 = recipe.score(valid_BN, levels.float(), gamma)[:, None]
        total_BK = total_BK + group_normalize(score_B1, group_ids)
    if recipe.whiten:
        one_group_B = torch.zeros(len(total_BK), dtype=torch.int64, device=total_BK.device)
        total_BK = group_normalize(total_BK, one_group_B)
    return _bounded(total_BK, advantages, clip)


def _split_groups(values_BR: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each sample's group index `[B]` and the values `[P, B, R]`, NaN outside the group."""
    labels, index_B = torch.unique(group_ids, return_inverse=True)
    member_PB = torch.arange(len(labels), device=group_ids.device)[:, None] == index_B
    # Masked copies, not index_add_, whose order of addition changes from run to run on CUDA: a
    # resumed run must repeat its numbers bit by bit.
    return index_B, torch.where(member_PB[:, :, None], values_BR, math.nan)


def _spread(members_PBR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased std and whether all are equal but for rounding, each `[P, R]`."""
    mean_PR = members_PBR.nanmean(dim=1)
    degrees_PR = (~members_PBR.isnan()).sum(dim=1) - 1
    squares_PR = (members_PBR - mean_PR[:, None]).square().nansum(dim=1)
    std_PR = (squares_PR / degrees_PR.clamp(min=1)).sqrt()
    tied_PR = std_PR <= _TIE_TOLERANCE * members_PBR.abs().nan_to_num(nan=0.0).amax(dim=1)
    return mean_PR, std_PR, tied_PR


def _weighted_total(per_objective: Tensor, synergy: Tensor | None, weights: Tensor) -> Tensor:
    _check_rows("per_objective", per_objective)
    if weights.ndim != 2 or weights.shape[1] != per_objective.shape[1]:
        raise ValueError(
            f"weights must have shape [steps, {per_objective.shape[1]}], one column per objective, "
            f"got {tuple(weights.shape)}; add a column for every objective of the rewards."
        )
    # A product and a sum: matmul would run in bfloat16 or TF32 under autocast.
    total_BK = (per_objective.float()[:, None, :] * weights.float()).sum(dim=-1)
    return total_BK if synergy is None else total_BK + synergy.float()[:, None]


def _bounded(total_BK: Tensor, per_objective: Tensor, clip: Real) -> Tensor:
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}; use float('inf') for no clipping.")
    invalid_B = per_objective.isnan().any(dim=1)
    return total_BK.clamp(-clip, clip).masked_fill(invalid_B[:, None], 0.0)


def _resolve(shaping: str | Shaping) -> Shaping:
    if isinstance(shaping, Shaping):
        return shaping
    if shaping not in SHAPINGS:
        raise ValueError(
            f"shaping must be one of {', '.join(SHAPINGS)}, got {shaping!r}; check the spelling."
        )
    return SHAPINGS[shaping]


def _pair_mean(
    term: Callable[[Tensor, Tensor], Tensor], advantages_BN: Tensor, gamma: Real
) -> Tensor:
    columns = advantages_BN.unbind(dim=1)
    if len(columns) < 2:
        raise ValueError(
            f"advantages must have at least 2 objectives for a synergy bonus, got {len(columns)}; "
            "use shaping 'linear' or 'gdpo' with a single objective."
        )
    terms = [term(a, b) for a, b in combinations(columns, 2)]
    # NaN anywhere in the row reaches every bonus: each objective is in at least one pair.
    return gamma * torch.stack(terms).mean(dim=0)


def _sars_term(a: Tensor, b: Tensor) -> Tensor:
    strength = torch.tanh((a * b).abs())
    return torch.where((a > 0) & (b > 0), strength, -strength)


def _harmonic_term(a: Tensor, b: Tensor) -> Tensor:
    product = a * b
    # A zero advantage earns nothing, also where a + b + 1e-6 is 0 and the formula reads 0 / 0.
    return torch.where(product == 0, product, product / (a + b + 1e-6))


def _gated_prompt(scores_BN: Tensor, levels_N: Tensor, gamma: Real) -> Tensor:
    identity_B, prompt_B = scores_BN[:, 0], scores_BN[:, 1]
    return prompt_B - gamma * (levels_N[0] - identity_B).clamp(min=0).square()


def _softplus_term(a: Tensor, b: Tensor) -> Tensor:
    return F.softplus(a) * F.softplus(b)


SHAPINGS: Mapping[str, Shaping] = MappingProxyType(
    {
        "sars": Shaping(bonus=partial(_pair_mean, _sars_term)),
        "linear": Shaping(),
        "min": Shaping(bonus=partial(_pair_mean, torch.minimum)),
        "max": Shaping(bonus=partial(_pair_mean, torch.maximum)),
        "harmonic": Shaping(bonus=partial(_pair_mean, _harmonic_term)),
        "product": Shaping(bonus=partial(_pair_mean, _softplus_term)),
        "synergy_only": Shaping(bonus=partial(_pair_mean, _sars_term), weighted_sum=False),
        "gdpo": Shaping(whiten=True),
        "gate": Shaping(score=_gated_prompt, weighted_sum=False),
    }
)
"""The shapings by name, those of the paper's ablation first; read-only."""


def _check_rows(name: str, rows: object) -> None:
    if not isinstance(rows, Tensor) or rows.ndim != 2:
        got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(
            f"{name} must be a tensor of shape [samples, columns], got {got}; for one column: "
            "x[:, None]."
        )


def _check_group_ids(group_ids: Tensor, rows: Tensor) -> None:
    _check_rows("scores", rows)
    if group_ids.shape != rows.shape[:1]:
        raise ValueError(
            f"group_ids must have one label per sample, shape [{rows.shape[0]}], got "
            f"{tuple(group_ids.shape)}; repeat each group's label for all its samples."
        )
