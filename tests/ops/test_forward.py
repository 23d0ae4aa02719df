"""The forward process, DiffusionNFT's loss, AWM's log-probability: slow loops, gradients."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from customized_grpo.ops import matching_log_prob, nft_loss, noised

PROPERTY = settings(derandomize=True, max_examples=40)


def random_velocities(seed: int) -> tuple[Tensor, ...]:
    """New and old velocity, sample, noise ``[5, 2, 3]``; noise level and advantage ``[5]``."""
    rng = torch.Generator().manual_seed(seed)
    new, old, latents, noise = torch.randn((4, 5, 2, 3), generator=rng)
    return (
        new,
        old,
        latents,
        noise,
        torch.rand(5, generator=rng),
        8 * torch.rand(5, generator=rng) - 4,
    )


def slow_loss(
    new: Tensor, old: Tensor, latents: Tensor, noise: Tensor, sigma: float, a: float, beta: float,
    clip: float,
) -> float:  # fmt: skip
    """One sample, number by number, as Algorithm 1 and the authors' code have it: in pictures."""
    flat = (x.flatten().tolist() for x in (new, old, latents, noise))
    positive, negative = [], []
    for v, v_old, x0, eps in zip(*flat, strict=True):
        x = (1 - sigma) * x0 + sigma * eps
        positive.append(x - sigma * (beta * v + (1 - beta) * v_old) - x0)
        negative.append(x - sigma * ((1 + beta) * v_old - beta * v) - x0)
    terms = []
    for errors in (positive, negative):
        weight = max(sum(map(abs, errors)) / len(errors), 1e-5)
        terms.append(sum(e * e / weight for e in errors) / len(errors))
    r = min(max(min(max(a, -clip), clip) / clip / 2 + 0.5, 0), 1)
    return clip * (r * terms[0] / beta + (1 - r) * terms[1] / beta)


class TestNftLoss:
    @PROPERTY
    @given(
        seed=st.integers(0, 2**31 - 1),
        beta=st.sampled_from([0.1, 1.0, 2.0]),
        clip=st.sampled_from([2.0, 5.0]),
    )
    def test_equals_a_slow_loop(self, seed: int, beta: float, clip: float) -> None:
        new, old, latents, noise, sigma, advantage = random_velocities(seed)
        found = nft_loss(new, old, noise - latents, sigma, advantage, beta, clip)
        for i, loss in enumerate(found.tolist()):
            levels = sigma[i].item(), advantage[i].item()
            slow = slow_loss(new[i], old[i], latents[i], noise[i], *levels, beta, clip)
            assert loss == pytest.approx(slow, rel=1e-5, abs=1e-5)

    @pytest.mark.parametrize("beta", [0.1, 1.0])
    def test_on_policy_its_gradient_is_that_of_weighted_matching(self, beta: float) -> None:
        """Of `A mean(e^2) / mean|e|`, whatever beta; so a sample of advantage 0 has none."""
        new, _, latents, noise, sigma, advantage = random_velocities(3)
        advantage[0] = 0
        new.requires_grad_()
        target = noise - latents
        nft_loss(new, new.detach(), target, sigma, advantage, beta).sum().backward()
        level = sigma[:, None, None]
        size = (level * (new - target)).abs().mean((1, 2), keepdim=True)
        expected = advantage[:, None, None] * 2 * level**2 * (new - target) / 6 / size
        assert new.grad is not None
        torch.testing.assert_close(new.grad, expected.detach(), rtol=1e-4, atol=1e-5)
        assert new.grad[0].abs().max() < 1e-6

    def test_the_old_policy_and_the_weight_get_no_gradient(self) -> None:
        new, old, latents, noise, sigma, advantage = random_velocities(4)
        new.requires_grad_(), old.requires_grad_()
        nft_loss(new, old, noise - latents, sigma, advantage).sum().backward()
        assert old.grad is None
        # Positive samples alone: the gradient of mean(e^2) divided by a constant.
        new.grad = None
        nft_loss(new, old, noise - latents, sigma, torch.full((5,), 5.0)).sum().backward()
        error = sigma[:, None, None] * (new - (noise - latents))
        size = error.detach().abs().mean((1, 2))
        (expected,) = torch.autograd.grad((5 * error.square().mean((1, 2)) / size).sum(), new)
        torch.testing.assert_close(new.grad, expected)

    def test_half_precision_is_computed_in_float32(self) -> None:
        new, old, latents, noise, sigma, advantage = random_velocities(5)
        new, old, target = (x.bfloat16() for x in (new, old, noise - latents))
        found = nft_loss(new, old, target, sigma, advantage)
        assert found.dtype == torch.float32
        full = nft_loss(new.float(), old.float(), target.float(), sigma, advantage)
        assert torch.equal(found, full)

    def test_mistakes_are_named(self) -> None:
        unchecked = inspect.unwrap(nft_loss)  # as without jaxtyping's checks, which the tests have
        v, sigma, advantage = torch.zeros(2, 3), torch.ones(2), torch.ones(2)
        with pytest.raises(ValueError, match=r"^beta must be positive, got 0;"):
            nft_loss(v, v, v, sigma, advantage, beta=0)
        with pytest.raises(ValueError, match=r"^clip must be positive, got -1;"):
            nft_loss(v, v, v, sigma, advantage, clip=-1)
        with pytest.raises(ValueError, match="old_velocity"):
            unchecked(v, v[:1], v, sigma, advantage)
        with pytest.raises(ValueError, match=r"^sigma must have one value per sample, 2, got"):
            unchecked(v, v, v, sigma[:1], advantage)


class TestMatchingLogProb:
    @PROPERTY
    @given(seed=st.integers(0, 2**31 - 1), power=st.sampled_from([0.25, 0.5, 1.0]))
    def test_equals_a_slow_loop(self, seed: int, power: float) -> None:
        velocity, _, latents, noise, sigma, _ = random_velocities(seed)
        found = matching_log_prob(velocity, noise - latents, sigma, power)
        for i, log_prob in enumerate(found.tolist()):
            pairs = zip(
                velocity[i].flatten().tolist(), latents[i].flatten().tolist(),
                noise[i].flatten().tolist(), strict=True,
            )  # fmt: skip
            errors = [(v - (eps - x0)) ** 2 for v, x0, eps in pairs]
            slow = -sigma[i].item() * (sum(errors) / len(errors)) ** power / power
            assert log_prob == pytest.approx(slow, rel=1e-5, abs=1e-6)

    def test_a_sample_that_is_met_has_a_finite_gradient(self) -> None:
        velocity = torch.ones(2, 3, requires_grad=True)
        matching_log_prob(velocity, torch.ones(2, 3), torch.ones(2)).sum().backward()
        assert velocity.grad is not None
        assert torch.equal(velocity.grad, torch.zeros(2, 3))

    def test_half_precision_is_computed_in_float32(self) -> None:
        velocity, _, latents, noise, sigma, _ = random_velocities(5)
        half, target = velocity.bfloat16(), (noise - latents).bfloat16()
        found = matching_log_prob(half, target, sigma)
        assert found.dtype == torch.float32
        assert torch.equal(found, matching_log_prob(half.float(), target.float(), sigma))

    def test_mistakes_are_named(self) -> None:
        v, sigma = torch.zeros(2, 3), torch.ones(2)
        for power in (0, 1.5):
            with pytest.raises(ValueError, match=rf"^power must lie in \(0, 1\], got {power};"):
                matching_log_prob(v, v, sigma, power)
        unchecked = inspect.unwrap(matching_log_prob)
        with pytest.raises(ValueError, match="target"):
            unchecked(v, v[:1], sigma)


def test_noised_latents_are_a_slow_loop() -> None:
    _, _, latents, noise, sigma, _ = random_velocities(1)
    found = noised(latents, noise, sigma)
    for i, level in enumerate(sigma.tolist()):
        for x, x0, eps in zip(
            found[i].flatten().tolist(), latents[i].flatten().tolist(), noise[i].flatten().tolist(),
            strict=True,
        ):  # fmt: skip
            assert x == pytest.approx((1 - level) * x0 + level * eps, abs=1e-6)
    assert torch.equal(noised(latents, noise, torch.zeros(5)), latents)
