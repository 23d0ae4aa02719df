"""The algorithm as pure functions of tensors; importing it needs torch and jaxtyping, no more."""

from customized_grpo.ops.advantages import (
    SHAPINGS,
    Shaping,
    combine_advantages,
    group_normalize,
    noise_variance,
    shape_advantages,
    shaping_bonus,
    synergy_bonus,
    win_rates,
)
from customized_grpo.ops.balance import BalanceMethod, balanced_factors
from customized_grpo.ops.forward import matching_log_prob, nft_loss, noised
from customized_grpo.ops.losses import (
    StepWeight,
    clipped_surrogate,
    masked_surrogate,
    norm_excess,
    normalize_ratio,
    step_weights,
)
from customized_grpo.ops.schedules import (
    SCHEDULES,
    constant_weights,
    cosine_weights,
    linear_weights,
    measured_weights,
    tdw_weights,
)
from customized_grpo.ops.sde import (
    Dynamics,
    cps_log_prob,
    gaussian_kl,
    gaussian_log_prob,
    sde_moments,
    shifted_sigmas,
)

__all__ = [
    "SCHEDULES",
    "SHAPINGS",
    "BalanceMethod",
    "Dynamics",
    "Shaping",
    "StepWeight",
    "balanced_factors",
    "clipped_surrogate",
    "combine_advantages",
    "constant_weights",
    "cosine_weights",
    "cps_log_prob",
    "gaussian_kl",
    "gaussian_log_prob",
    "group_normalize",
    "linear_weights",
    "masked_surrogate",
    "matching_log_prob",
    "measured_weights",
    "nft_loss",
    "noise_variance",
    "noised",
    "norm_excess",
    "normalize_ratio",
    "sde_moments",
    "shape_advantages",
    "shaping_bonus",
    "shifted_sigmas",
    "step_weights",
    "synergy_bonus",
    "tdw_weights",
    "win_rates",
]
