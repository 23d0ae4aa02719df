"""Denoising steps as Gaussian policies: schedules, transition moments, log-probabilities, KL.

Conventions: `sigma = 1` is pure noise and `sigma = 0` is data; `x_sigma = (1 - sigma) x0 + sigma
eps`; the model predicts the velocity `v = eps - x0`. One step goes from `sigma` down to
`sigma_next`, and `D = sigma - sigma_next > 0`. Everything is computed and returned in float32,
whatever the model's dtype: a ratio that lives within 1e-4 of 1 does not survive bfloat16.
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float32
from torch import Tensor

Dynamics = Literal["dance", "flow", "cps", "ode"]
"""The four transition kernels of `sde_moments`."""

Real = int | float
"""A number; spelt out because a run-time type check, unlike a static one, tells int from float."""

Scale = Real | Float[Tensor, ""] | Float[Tensor, " batch"]
"""One noise level for the whole batch, or one per sample."""

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def shifted_sigmas(num_steps: int, shift: Real = 1.0) -> Float32[Tensor, " {num_steps}+1"]:
    """Returns the noise levels of a denoising trajectory, from 1 (noise) to 0 (data).

    `sigma_i = s u_i / (1 + (s - 1) u_i)` with `u = linspace(1, 0, T + 1)` and shift `s`
    (SD3, arXiv:2403.03206; Customized-GRPO uses T = 25, s = 3).

    Args:
        num_steps: number T of denoising steps, at least 1.
        shift: time shift s > 0; above 1 spends more steps at high noise.

    Returns:
        `[T + 1]` float32, strictly decreasing, first value 1 and last value 0.

    Raises:
        ValueError: if `num_steps` < 1 or `shift` <= 0.

    Example:
        >>> shifted_sigmas(4)
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000])
        >>> shifted_sigmas(4, shift=3.0)
        tensor([1.0000, 0.9000, 0.7500, 0.5000, 0.0000])
    """
    if num_steps < 1:
        raise ValueError(
            f"num_steps must be at least 1, got {num_steps}; pass the number of denoising steps."
        )
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}; use 1.0 for an unshifted schedule.")
    uniform = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    return (shift * uniform / (1.0 + (shift - 1.0) * uniform)).float()


def sde_moments(
    velocity: Float[Tensor, " batch *dims"],
    latents: Float[Tensor, " batch *dims"],
    sigma: Scale,
    sigma_next: Scale,
    *,
    dynamics: Dynamics = "dance",
    noise_level: Real,
    sigma_max: Real | Float[Tensor, ""] | None = None,
) -> tuple[Float32[Tensor, " batch *dims"], Float32[Tensor, "..."]]:
    """Returns mean and std of the Gaussian that one denoising step samples x_sigma_next from.

    With `x0 = x - sigma v` and `x1 = x + (1 - sigma) v` (the predicted image and the predicted
    noise):

    - `dance` (DanceGRPO, arXiv:2505.07818; the paper's choice with `noise_level` eta = 0.4):
      `mean = x - D v + eta^2 D score / 2`, `score = -(x - (1 - sigma) x0) / sigma^2 = -x1 / sigma`,
      `std = eta sqrt(D)`.
    - `flow` (Flow-GRPO, arXiv:2505.05470; a = 0.7): `q = a sqrt(sigma / (1 - sigma))`,
      `mean = x (1 - q^2 D / (2 sigma)) - v (1 + q^2 (1 - sigma) / (2 sigma)) D`, `std = q sqrt(D)`.
      At `sigma = 1` the `1 - sigma` inside q (and only there) is `1 - sigma_max`.
    - `cps` (Flow-CPS, arXiv:2509.05952): `std = sigma_next sin(a pi / 2)`,
      `mean = (1 - sigma_next) x0 + sqrt(sigma_next^2 - std^2) x1`.
    - `ode` (Euler): `mean = x - D v`, `std = 0`; deterministic, so it has no log-probability.

    Args:
        velocity: model output `[B, ...]`, any floating dtype; gradients flow through it into the
            mean.
        latents: `[B, ...]`, any floating dtype.
        sigma: noise level now, in (0, 1]: a number, a 0-d tensor or `[B]`; tensors must not be half
            precision.
        sigma_next: noise level after the step, in [0, sigma).
        dynamics: the transition kernel.
        noise_level: eta for `dance`, a for `flow`, a in [0, 1] for `cps`; `ode` has no noise and
            does not read it.
        sigma_max: the schedule's second sigma, in [0, 1). Needed by `flow` for a step that starts
            at pure noise, where its q would be infinite; the other dynamics have no such
            singularity and do not read it.

    Returns:
        `mean` `[B, ...]` and `std`, both float32. `std` is 0-d for scalar sigmas and `[B, 1, ...,
        1]` for `[B]` sigmas, so `mean + std * noise` is always the sample. A 0-d `std` stays on
        sigma's device.

    Raises:
        ValueError: for an unknown `dynamics`, a negative `noise_level` (or one above 1 for `cps`),
            a sigma of the wrong shape or in half precision, `flow` at `sigma = 1` without a valid
            `sigma_max`, and, where this needs no accelerator synchronisation, `sigma <= sigma_next`
            or a sigma outside [0, 1].

    Example:
        >>> velocity, latents = torch.ones(1, 2), torch.zeros(1, 2)
        >>> sde_moments(velocity, latents, 0.5, 0.25, dynamics="ode", noise_level=0)
        (tensor([[-0.2500, -0.2500]]), tensor(0.))
        >>> sde_moments(velocity, latents, 0.5, 0.25, dynamics="dance", noise_level=0.4)
        (tensor([[-0.2700, -0.2700]]), tensor(0.2000))
    """
    _check_kernel(dynamics, noise_level)
    x, v = latents.float(), velocity.float()
    sigma_now, sigma_then = _per_sample("sigma", sigma, x), _per_sample("sigma_next", sigma_next, x)
    _check_descending(sigma_now, sigma_then)
    match dynamics:
        case "dance":
            return _dance_moments(x, v, sigma_now, sigma_now - sigma_then, noise_level)
        case "flow":
            clean_fraction = 1.0 - _capped_sigma(sigma_now, sigma_max)
            return _flow_moments(
                x, v, sigma_now, sigma_now - sigma_then, noise_level, clean_fraction
            )
        case "cps":
            return _cps_moments(x, v, sigma_now, sigma_then, noise_level)
        case "ode":
            step = sigma_now - sigma_then
            return x - step * v, torch.zeros_like(step)


def _dance_moments(
    x: Tensor, v: Tensor, sigma: Tensor, step: Tensor, noise_level: Real
) -> tuple[Tensor, Tensor]:
    # -x1 / sigma is the paper's score without its cancellation (0 / 0) at small sigma.
    score = -(x + (1.0 - sigma) * v) / sigma
    mean = x - step * v + 0.5 * noise_level**2 * step * score
    return mean, noise_level * step.sqrt()


def _flow_moments(
    x: Tensor, v: Tensor, sigma: Tensor, step: Tensor, noise_level: Real, clean_fraction: Tensor
) -> tuple[Tensor, Tensor]:
    diffusion = noise_level * (sigma / clean_fraction).sqrt()
    pull = diffusion**2 * step / (2.0 * sigma)
    mean = x * (1.0 - pull) - v * (step + pull * (1.0 - sigma))
    return mean, diffusion * step.sqrt()


def _cps_moments(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: Real
) -> tuple[Tensor, Tensor]:
    angle = 0.5 * math.pi * noise_level
    denoised, noise = x - sigma * v, x + (1.0 - sigma) * v
    # sqrt(sigma_next^2 - std^2) is sigma_next cos(angle), which never takes the root of a negative.
    mean = (1.0 - sigma_next) * denoised + sigma_next * math.cos(angle) * noise
    return mean, sigma_next * math.sin(angle)


def gaussian_log_prob(
    sample: Float[Tensor, " batch *dims"],
    mean: Float[Tensor, " batch *dims"],
    std: Real | Float[Tensor, "..."],
) -> Float32[Tensor, " batch"]:
    """Returns the Gaussian log-density of each sample, averaged over its dimensions.

    `log p = mean_d[ -(x'_d - mean_d)^2 / (2 std^2) - log std - log(2 pi) / 2 ]`: the full density,
    constants included, as a mean (not a sum) over all non-batch dimensions, as DanceGRPO and
    Flow-GRPO define it.

    Args:
        sample: the stored next latents x' `[B, ...]`, exactly the numbers the rollout stored.
        mean: `[B, ...]`, from `sde_moments`; gradients flow.
        std: positive; a number, a 0-d tensor, `[B]`, or `[B, 1, ..., 1]`.

    Returns:
        `[B]` float32.

    Raises:
        ValueError: if `sample` and `mean` differ in shape, if `std` has a wrong shape or is in half
            precision, and, where this needs no accelerator synchronisation, if `std` is not
            positive (an `ode` step).

    Example:
        A mean over dimensions: the size of the picture does not matter.

        >>> gaussian_log_prob(torch.zeros(1, 4), torch.zeros(1, 4), std=1.0)
        tensor([-0.9189])
        >>> gaussian_log_prob(torch.zeros(1, 400), torch.zeros(1, 400), std=1.0)
        tensor([-0.9189])
    """
    check_same_shape("sample", sample, "mean", mean)
    scale = _positive_std(std, mean)
    standardised = (sample.float() - mean.float()) / scale
    return _mean_over_dims(-0.5 * standardised**2 - scale.log() - _HALF_LOG_2PI)


def cps_log_prob(
    sample: Float[Tensor, " batch *dims"], mean: Float[Tensor, " batch *dims"]
) -> Float32[Tensor, " batch"]:
    """Returns `mean_d[ -(x'_d - mean_d)^2 ]`, the default log-probability of the `cps` dynamics.

    Flow-CPS (arXiv:2509.05952) drops the variance and the constants of the density, which removes
    the 1 / std^2 that would let the last, nearly noise-free steps dominate the update.

    Args:
        sample: the stored next latents x' `[B, ...]`.
        mean: `[B, ...]`, from `sde_moments(..., dynamics="cps")`; gradients flow.

    Returns:
        `[B]` float32.

    Raises:
        ValueError: if `sample` and `mean` differ in shape.

    Example:
        >>> cps_log_prob(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2))
        tensor([-0.5000])
    """
    check_same_shape("sample", sample, "mean", mean)
    return _mean_over_dims(-((sample.float() - mean.float()) ** 2))


def gaussian_kl(
    mean: Float[Tensor, " batch *dims"],
    reference_mean: Float[Tensor, " batch *dims"],
    std: Real | Float[Tensor, "..."],
) -> Float32[Tensor, " batch"]:
    """Returns KL(N(mean, std^2) || N(reference_mean, std^2)) of each sample, mean over its dims.

    `KL = mean_d[ (mean_d - reference_d)^2 / (2 std^2) ]`, the closed form for two transitions that
    share their std (Flow-GRPO, arXiv:2505.05470). Gradients flow through `mean` (and
    `reference_mean`, which the caller computes without gradient).

    Args:
        mean: `[B, ...]` of the trained policy.
        reference_mean: `[B, ...]` of the reference policy (the adapter switched off).
        std: positive; a number, a 0-d tensor, `[B]`, or `[B, 1, ..., 1]`.

    Returns:
        `[B]` float32, not negative.

    Raises:
        ValueError: if the means differ in shape, if `std` has a wrong shape or is in half
            precision, and, where this needs no accelerator synchronisation, if `std` is not
            positive.

    Example:
        >>> gaussian_kl(torch.ones(1, 2), torch.zeros(1, 2), std=0.5)
        tensor([2.])
    """
    check_same_shape("mean", mean, "reference_mean", reference_mean)
    scale = _positive_std(std, mean)
    return _mean_over_dims(0.5 * ((mean.float() - reference_mean.float()) / scale) ** 2)


def require_full_precision(name: str, value: Tensor) -> None:
    """Rejects a half-precision tensor where half precision would destroy the result.

    Args:
        name: the argument's name, for the message.
        value: any floating tensor.

    Raises:
        ValueError: if `value` is float16 or bfloat16, or no tensor.
    """
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} must be a tensor, got {type(value).__name__}; write torch.tensor(...)."
        )
    if value.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"{name} must be float32 or float64, got {value.dtype}, which keeps 2 to 3 digits; "
            f"compute {name} in float32 instead of casting it."
        )


def _per_sample(name: str, value: Real | Tensor, like: Tensor) -> Tensor:
    """Returns `value` in float32, shaped so that it broadcasts over the batch of `like`."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float32)
    require_full_precision(name, value)
    # A 0-d tensor combines with any device as it is; moving it would stall an accelerator's queue.
    if value.ndim == 0:
        return value.float()
    broadcast_shape = (like.shape[0],) + (1,) * (like.ndim - 1)
    if value.shape != (like.shape[0],) and value.shape != broadcast_shape:
        raise ValueError(
            f"{name} must be a scalar or have one value for each of the {like.shape[0]} samples, "
            f"got shape {tuple(value.shape)}; index it by sample first."
        )
    return value.float().to(like.device).view(broadcast_shape)


def _positive_std(std: Real | Tensor, like: Tensor) -> Tensor:
    scale = _per_sample("std", std, like)
    if scale.device.type == "cpu" and not bool((scale > 0).all()):
        raise ValueError(
            f"std must be positive, got {scale.min().item()}; a step without noise (ode, or "
            "noise_level 0) has no log-probability and no KL: leave it out of the trained steps."
        )
    return scale


def _capped_sigma(sigma: Tensor, sigma_max: Real | Tensor | None) -> Tensor:
    """Returns sigma with the value 1 replaced by `sigma_max`, the schedule's second sigma."""
    at_pure_noise = sigma == 1.0
    if sigma_max is not None:
        on_host = not isinstance(sigma_max, Tensor) or sigma_max.device.type == "cpu"
        if on_host and not 0 <= float(sigma_max) < 1:
            raise ValueError(
                f"sigma_max must lie in [0, 1), got {float(sigma_max)}; pass sigmas[1]."
            )
        return torch.where(at_pure_noise, sigma_max, sigma)
    if bool(at_pure_noise.any()):
        raise ValueError(
            "sigma_max must be given for flow dynamics at sigma = 1, got None; pass the schedule's "
            "second sigma, sigmas[1]."
        )
    return sigma


def _check_kernel(dynamics: str, noise_level: Real) -> None:
    if dynamics not in get_args(Dynamics):
        raise ValueError(
            f"dynamics must be one of {', '.join(get_args(Dynamics))}, got {dynamics!r}; "
            "check the spelling."
        )
    if not noise_level >= 0:
        raise ValueError(
            f"noise_level must not be negative, got {noise_level}; use 0 (or ode) for no noise."
        )
    if dynamics == "cps" and noise_level > 1:
        raise ValueError(
            f"noise_level must lie in [0, 1] for cps, got {noise_level}; its std is sin(a pi / 2)."
        )


def _check_descending(sigma: Tensor, sigma_next: Tensor) -> None:
    if sigma.device.type != "cpu" or sigma_next.device.type != "cpu":
        return
    if not bool(((sigma <= 1) & (sigma > sigma_next) & (sigma_next >= 0)).all()):
        raise ValueError(
            "sigma and sigma_next must satisfy 1 >= sigma > sigma_next >= 0, got "
            f"{sigma.flatten().tolist()} and {sigma_next.flatten().tolist()}; pass the noisier "
            "level first, and noise levels instead of timesteps."
        )


def check_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Rejects two tensors that do not belong together.

    Args:
        name: the first argument's name, for the message.
        value: any tensor.
        other_name: the second argument's name.
        other: what must have the same shape.

    Raises:
        ValueError: if it has not.
    """
    if value.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape, got {tuple(value.shape)} and "
            f"{tuple(other.shape)}; expand one of them first if that is what you mean."
        )


def _mean_over_dims(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1) if values.ndim > 1 else values
