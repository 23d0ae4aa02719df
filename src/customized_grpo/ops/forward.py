"""The forward process: latents noised anew, and on them the loss of DiffusionNFT and the
log-probability of advantage weighted matching."""

from jaxtyping import Float, Float32
from torch import Tensor

from customized_grpo.ops.sde import Real, check_same_shape

_SMALLEST_ERROR = 1e-5  # of the adaptive weight, as in the authors' code
_ROUNDING = 1e-10  # below it an error has no slope that is finite, as in AWM's code


def noised(
    latents: Float[Tensor, " batch *dims"],
    noise: Float[Tensor, " batch *dims"],
    sigma: Float[Tensor, " batch"],
) -> Float32[Tensor, " batch *dims"]:
    """Returns `(1 - sigma) latents + sigma noise`, the forward process of rectified flow.

    Args:
        latents: `[B, ...]`, of a picture.
        noise: `[B, ...]`, standard normal.
        sigma: `[B]` in [0, 1], a noise level per sample.

    Returns:
        `[B, ...]` float32.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> noised(torch.tensor([[1.0], [1.0]]), torch.zeros(2, 1), torch.tensor([0.0, 0.75]))
        tensor([[1.0000],
                [0.2500]])
    """
    check_same_shape("latents", latents, "noise", noise)
    level = _like(sigma, latents)
    return (1.0 - level) * latents.float() + level * noise.float()


def nft_loss(
    velocity: Float[Tensor, " batch *dims"],
    old_velocity: Float[Tensor, " batch *dims"],
    target: Float[Tensor, " batch *dims"],
    sigma: Float[Tensor, " batch"],
    advantage: Float[Tensor, " batch"],
    beta: Real = 1.0,
    clip: Real = 5.0,
) -> Float32[Tensor, " batch"]:
    """Returns DiffusionNFT's loss of every noised sample (arXiv:2509.16117).

    A sample is a positive example with the probability `r = clamp(A / (2 clip) + 1/2, 0, 1)`, and
    else a negative one. With `v* = noise - latents`, the velocity that leads back to the sample,

    - `v+ = (1 - beta) v_old + beta v` shall come near it,
    - `v- = (1 + beta) v_old - beta v`, the implicit negative policy, its mirror image, likewise,

    so that v itself goes away from negative samples. In terms of the picture that a velocity
    predicts, `x0 = x_sigma - sigma v`, the error is `e = sigma (v+- - v*)`, and

    `L = (clip / beta) (r mean(e+^2) / |e+| + (1 - r) mean(e-^2) / |e-|)`

    with means over dimensions and `|e| = max(mean |e|, 1e-5)` without a gradient, the authors'
    adaptive weight. Where `v = v_old` the gradient is that of `A mean(e^2) / |e|`, whatever beta.

    Args:
        velocity: `[B, ...]` of the trained model at the noised latents; gradients flow.
        old_velocity: `[B, ...]` of the policy that sampled; no gradient.
        target: `[B, ...]`, v*.
        sigma: `[B]`, the noise levels, positive.
        advantage: `[B]`, 0 being neither good nor bad.
        beta: strength of the guidance by the samples, positive; the authors take 1 or 0.1.
        clip: the advantage of a sample that is wholly positive; the authors take 5.

    Returns:
        `[B]` float32.

    Raises:
        ValueError: if shapes differ, or `beta` or `clip` is not positive.

    Example:
        The better sample is approached, the worse one left:

        >>> velocity = torch.zeros(2, 1, requires_grad=True)
        >>> target, sigma = torch.ones(2, 1), torch.ones(2)
        >>> loss = nft_loss(velocity, torch.zeros(2, 1), target, sigma, torch.tensor([1.0, -1.0]))
        >>> loss.sum().backward()
        >>> loss.detach(), velocity.grad.flatten().round()
        (tensor([5., 5.]), tensor([-2.,  2.]))
    """
    check_same_shape("velocity", velocity, "old_velocity", old_velocity)
    check_same_shape("velocity", velocity, "target", target)
    for name, value in (("beta", beta), ("clip", clip)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}; DiffusionNFT has 1 and 5.")
    new, old, level = velocity.float(), old_velocity.detach().float(), _like(sigma, velocity)
    share = (advantage.float() / (2.0 * clip) + 0.5).clamp(0.0, 1.0)
    positive = _error(level * ((1.0 - beta) * old + beta * new - target))
    negative = _error(level * ((1.0 + beta) * old - beta * new - target))
    return (clip / beta) * (share * positive + (1.0 - share) * negative)


def matching_log_prob(
    velocity: Float[Tensor, " batch *dims"],
    target: Float[Tensor, " batch *dims"],
    sigma: Float[Tensor, " batch"],
    power: Real = 0.25,
) -> Float32[Tensor, " batch"]:
    """Returns what advantage weighted matching takes for log-probabilities (AWM, arXiv:2509.25050).

    `log p = -sigma (mean((v - v*)^2) + 1e-10)^power / power`, with `v* = noise - latents`, the
    velocity that leads back to the sample: pretraining's loss, which bounds the likelihood of the
    sample. The power makes large errors count less; 1/4 is the generalised Huber loss of the
    authors' code. `clipped_surrogate` of these, with those of the policy that sampled at the same
    noise, is AWM's loss.

    Args:
        velocity: `[B, ...]` of a model at the noised latents; gradients flow.
        target: `[B, ...]`, v*.
        sigma: `[B]`, the noise levels, positive.
        power: in (0, 1].

    Returns:
        `[B]` float32.

    Raises:
        ValueError: if shapes differ, or `power` is not in (0, 1].

    Example:
        >>> velocity, target = torch.zeros(2, 2), torch.tensor([[0.25, 0.25], [4.0, 4.0]])
        >>> matching_log_prob(velocity, target, torch.tensor([1.0, 0.5]), power=0.5)
        tensor([-0.5000, -4.0000])
    """
    check_same_shape("velocity", velocity, "target", target)
    if not 0 < power <= 1:
        raise ValueError(f"power must lie in (0, 1], got {power}; AWM has 0.25.")
    error = (velocity.float() - target.float()).flatten(1).square().mean(1)
    return -_like(sigma, velocity).flatten() * (error + _ROUNDING) ** power / power


def _error(difference: Tensor) -> Tensor:
    flat = difference.flatten(1)
    size = flat.detach().abs().mean(1).clamp(min=_SMALLEST_ERROR)
    return flat.square().mean(1) / size


def _like(sigma: Tensor, latents: Tensor) -> Tensor:
    if sigma.shape != latents.shape[:1]:
        raise ValueError(
            f"sigma must have one value per sample, {latents.shape[0]}, got the shape "
            f"{tuple(sigma.shape)}."
        )
    return sigma.float().view(-1, *[1] * (latents.dim() - 1))
