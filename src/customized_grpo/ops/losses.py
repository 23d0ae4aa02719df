"""The policy loss: PPO's clipped surrogate on denoising steps or Flow-DPPO's masked one,
GRPO-Guard's ratio norm, NormGuard's penalty, and how much each step counts."""

from typing import Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from customized_grpo.ops.sde import (
    Dynamics,
    Real,
    check_same_shape,
    gaussian_kl,
    require_full_precision,
    sde_moments,
)

StepWeight = Literal["none", "noise", "equal"]
"""What a step's gradient is proportional to, see `step_weights`."""


def clipped_surrogate(
    log_prob: Float[Tensor, "*pairs"],
    old_log_prob: Float[Tensor, "*pairs"],
    advantage: Float[Tensor, "*pairs"],
    clip_range: float = 1e-4,
    denominator: Real | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Returns PPO's clipped loss over (sample, step) pairs (PPO arXiv:1707.06347).

    `L = mean max(-A r, -A clip(r, 1 - c, 1 + c))` with `r = exp(log_prob - old_log_prob)`.
    Log-probabilities are means over dimensions, so ratios live very close to 1 and `c` is 1e-4 in
    the released recipe.

    Args:
        log_prob: of the stored next latents under the trained policy; any shape, usually `[M]`;
            gradients flow.
        old_log_prob: the same under the rollout policy, same shape, no gradient.
            `log_prob.detach()` pins the ratio to 1 (the first update after a rollout).
        advantage: same shape; 0 for invalid samples.
        clip_range: c, in (0, 1).
        denominator: what the sum over pairs is divided by; None means their number (a mean). To
            accumulate micro-batches pass the number of pairs of the whole update to each: their
            losses then add up to the loss of the whole, whatever their sizes. (With DDP, which
            averages gradients, divide it by the world size.)

    Returns:
        The 0-d loss, and as detached 0-d statistics of the given pairs `ratio_mean`,
        `ratio_abs_dev` (mean `|r - 1|`, the mismatch before the first update) and `clip_fraction`
        (share of pairs whose gradient the clip cuts: A > 0 and r > 1 + c, or A < 0 and r < 1 - c).

    Raises:
        ValueError: if the three shapes differ, a log-probability is in half precision, `clip_range`
            is not in (0, 1), or `denominator` is not positive.

    Example:
        Two good samples: the policy has moved to the first far enough, so it is cut.

        >>> log_prob, advantage = torch.tensor([0.01, -0.01]), torch.tensor([1.0, 1.0])
        >>> loss, stats = clipped_surrogate(log_prob, torch.zeros(2), advantage)
        >>> stats["clip_fraction"]
        tensor(0.5000)
    """
    _check_pairs(log_prob, old_log_prob, advantage)
    if not 0 < clip_range < 1:
        raise ValueError(f"clip_range must lie in (0, 1), got {clip_range}; the paper uses 1e-4.")
    _check_denominator(denominator)
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped).sum()
    with torch.no_grad():
        cut = ((advantage > 0) & (ratio > clipped)) | ((advantage < 0) & (ratio < clipped))
        stats = _ratio_statistics(ratio, cut)
    return loss / (log_prob.numel() if denominator is None else denominator), stats


def masked_surrogate(
    log_prob: Float[Tensor, "*pairs"],
    old_log_prob: Float[Tensor, "*pairs"],
    advantage: Float[Tensor, "*pairs"],
    divergence: Float[Tensor, "*pairs"],
    threshold: float,
    denominator: Real | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Returns Flow-DPPO's loss (arXiv:2606.11025), whose trust region is a KL instead of a ratio.

    `L = mean -A r`, without the pairs that have gone too far (`divergence >= threshold`) and would
    go further (A > 0 and r > 1, or A < 0 and r < 1). The ratio of one sample is a noisy guess of
    how far a step's Gaussian has moved, and 1 / std^2 noisier at late steps; its KL is known
    exactly. A pair that comes back from afar keeps its gradient.

    Args:
        log_prob: of the stored next latents under the trained policy; any shape, usually `[M]`;
            gradients flow.
        old_log_prob: the same under the rollout policy, same shape, no gradient.
        advantage: same shape; 0 for invalid samples.
        divergence: same shape, `gaussian_kl` between the two policies' steps, a mean over
            dimensions; only compared, no gradient.
        threshold: of the divergence, positive; the authors' code has 1e-5.
        denominator: as in `clipped_surrogate`.

    Returns:
        The 0-d loss, and the statistics of `clipped_surrogate`, `clip_fraction` being the share of
        pairs without a gradient for the mask, and `rollout_kl`, the mean divergence.

    Raises:
        ValueError: as `clipped_surrogate`, and if `threshold` is not positive.

    Example:
        Two good samples at equally changed steps, of which one has become less probable:

        >>> log_prob, advantage = torch.tensor([0.01, -0.01]), torch.tensor([1.0, 1.0])
        >>> far = torch.full((2,), 1e-4)
        >>> loss, stats = masked_surrogate(log_prob, torch.zeros(2), advantage, far, 1e-5)
        >>> loss, stats["clip_fraction"]
        (tensor(-0.4950), tensor(0.5000))
    """
    _check_pairs(log_prob, old_log_prob, advantage, divergence)
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold}; Flow-DPPO uses 1e-5.")
    _check_denominator(denominator)
    ratio = torch.exp(log_prob - old_log_prob)
    with torch.no_grad():
        further = ((advantage > 0) & (ratio > 1)) | ((advantage < 0) & (ratio < 1))
        cut = further & (divergence >= threshold)
        stats = _ratio_statistics(ratio, cut) | {"rollout_kl": divergence.mean()}
    loss = torch.where(cut, 0.0, -advantage * ratio).sum()
    return loss / (log_prob.numel() if denominator is None else denominator), stats


def normalize_ratio(
    log_prob: Float[Tensor, " batch"],
    old_log_prob: Float[Tensor, " batch"],
    mean: Float[Tensor, " batch *dims"],
    old_mean: Float[Tensor, " batch *dims"],
    std: Real | Float[Tensor, "..."],
) -> Float32[Tensor, " batch"]:
    """Makes the log-ratios of all steps comparable: RatioNorm of GRPO-Guard (arXiv:2510.22319).

    For Gaussian steps `x' = old_mean + std eps`, with `d = mean - old_mean` and means over
    dimensions as in `gaussian_log_prob`, `log r = mean(d eps) / std - mean(d^2) / (2 std^2)`. The
    second term pushes every ratio below 1 and the factor 1 / std makes late, low-noise steps the
    widest, so that one clip range cannot fit all steps. Implemented, per sample:

    `log r~ = std (log r + mean(d^2) / (2 std^2)) = mean(d eps)`

    which has mean 0 under the rollout policy and no factor 1 / std. Feed the result to the loss as
    `clipped_surrogate(log_ratio, torch.zeros_like(log_ratio), advantage)`. The paper's second part,
    the gradient reweighting by 1 / D per step, is a positive factor on the advantage and is left to
    the caller.

    Args:
        log_prob: `[B]`, `gaussian_log_prob` under the trained policy (not `cps_log_prob`);
            gradients flow.
        old_log_prob: `[B]` under the rollout policy.
        mean: `[B, ...]` of the trained policy; gradients flow.
        old_mean: `[B, ...]` of the rollout policy.
        std: of the step, the same for both policies; positive; a number, a 0-d tensor, `[B]`, or
            `[B, 1, ..., 1]`.

    Returns:
        `[B]` float32, the normalised log-ratio; 0 on policy.

    Raises:
        ValueError: if shapes differ, a log-probability or `std` is in half precision, or as
            `gaussian_kl` for `std`.

    Example:
        >>> old_mean, std = torch.zeros(1, 2), 0.5
        >>> mean, sample = old_mean + 0.1, old_mean + std
        >>> log_prob, old = (gaussian_log_prob(sample, m, std) for m in (mean, old_mean))
        >>> log_prob - old
        tensor([0.1800])
        >>> normalize_ratio(log_prob, old, mean, old_mean, std)
        tensor([0.1000])
    """
    _check_pairs(log_prob, old_log_prob)
    per_sample_std = std.flatten() if isinstance(std, Tensor) and std.ndim else std
    bias = gaussian_kl(mean, old_mean, std)
    return per_sample_std * (log_prob.float() - old_log_prob.float() + bias)


def norm_excess(
    velocity: Float[Tensor, " batch *dims"], reference: Float[Tensor, " batch *dims"]
) -> Float32[Tensor, " batch"]:
    """Returns by what share each velocity is longer than the untrained model's (NormGuard).

    `max(0, ||v|| / ||v_ref|| - 1)`: a hinge, without a gradient while the velocity is not longer.
    RL lengthens velocities by 5 to 15 %, seen as oversharpened and oversaturated pictures, and that
    carries no reward (arXiv:2606.27771, which has the hinge; that it is relative, so that its
    weight suits latents of any size, is ours).

    Args:
        velocity: `[B, ...]` of the trained model; gradients flow.
        reference: `[B, ...]` of the untrained one at the same latents, not zero.

    Returns:
        `[B]` float32, not negative.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> norm_excess(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[0.0, 4.0]] * 2))
        tensor([0.2500, 0.0000])
    """
    check_same_shape("velocity", velocity, "reference", reference)
    length, allowed = (v.float().flatten(1).norm(dim=1) for v in (velocity, reference))
    return (length / allowed - 1.0).clamp(min=0.0)


def step_weights(
    sigmas: Float[Tensor, " sigmas"],
    balance: StepWeight,
    *,
    dynamics: Dynamics,
    noise_level: Real,
    steps: range,
    ratio_norm: bool = False,
) -> Float32[Tensor, " sigmas-1"]:
    """Returns a positive factor per step on its advantage, so that the steps count as wanted.

    With `c = d mean / d v` of `sde_moments`, the gradient of a step's log-probability by the
    velocity is `c eps / std` (`2 c std eps` for `cps_log_prob`, `c eps` after `normalize_ratio`),
    which is several times larger for late steps: what they decide counts more than its advantage
    says. The factor makes that gradient proportional to

    - `noise`: c, i.e. to `std` as a factor on the Gaussian log-probability (TempFlow-GRPO,
      arXiv:2508.04324: by the noise a step explores with);
    - `equal`: 1, the same for all (the reweighting by 1 / D of GRPO-Guard, arXiv:2510.22319);
    - `none`: what it is.

    Args:
        sigmas: the schedule, `[T + 1]`.
        balance: which of the three.
        dynamics: the kernel of the steps; not `ode`, which has no log-probability.
        noise_level: of the kernel.
        steps: those that may be trained; their factors have mean 1, so that the learning rate keeps
            its meaning. All must have noise.
        ratio_norm: whether the log-ratios go through `normalize_ratio`.

    Returns:
        `[T]` float32, 1 at steps that are not trained.

    Raises:
        ValueError: as `sde_moments`, and for a trained step without noise.

    Example:
        >>> options = {"dynamics": "flow", "noise_level": 0.7, "steps": range(3)}
        >>> step_weights(torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), "equal", **options)
        tensor([1.4305, 0.9950, 0.5745, 1.0000])
    """
    factors = torch.ones(len(sigmas) - 1)
    if balance == "none":
        return factors
    trained = torch.tensor(list(steps))
    now, then = sigmas.cpu()[trained], sigmas.cpu()[trained + 1]
    unit, zero = torch.ones(len(trained), 1), torch.zeros(len(trained), 1)
    slope, std = sde_moments(  # the mean is linear in the velocity
        unit, zero, now, then, dynamics=dynamics, noise_level=noise_level, sigma_max=sigmas.cpu()[1]
    )
    slope, std = slope[:, 0].abs(), std.flatten()
    if not bool((std > 0).all()):
        raise ValueError(f"steps must have noise, got std {std.tolist()} at {list(steps)}.")
    per_slope = std if dynamics == "cps" else 1.0 / std  # of a gradient without the constant of cps
    gradient = slope if ratio_norm else slope * per_slope
    wanted = slope if balance == "noise" else torch.ones_like(slope)
    raw = wanted / gradient
    factors[trained] = raw / raw.mean()
    return factors


def _ratio_statistics(ratio: Tensor, cut: Tensor) -> dict[str, Tensor]:
    return {
        "ratio_mean": ratio.mean(),
        "ratio_abs_dev": (ratio - 1.0).abs().mean(),
        "clip_fraction": cut.float().mean(),
    }


def _check_denominator(denominator: Real | None) -> None:
    if denominator is not None and not denominator > 0:
        raise ValueError(
            f"denominator must be positive, got {denominator}; pass the update's number of pairs."
        )


def _check_pairs(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor | None = None,
    divergence: Tensor | None = None,
) -> None:
    require_full_precision("log_prob", log_prob)
    require_full_precision("old_log_prob", old_log_prob)
    others = {"old_log_prob": old_log_prob, "advantage": advantage, "divergence": divergence}
    for name, value in others.items():
        if value is not None and value.shape != log_prob.shape:
            raise ValueError(
                f"{name} must have log_prob's shape {tuple(log_prob.shape)}, got "
                f"{tuple(value.shape)}; entry i of each must be the same sample and step."
            )
