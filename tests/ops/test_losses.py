"""Clipped surrogate and ratio normalisation: golden vector, slow loop, gradients."""

import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from customized_grpo.ops import (
    clipped_surrogate,
    gaussian_kl,
    gaussian_log_prob,
    masked_surrogate,
    norm_excess,
    normalize_ratio,
    sde_moments,
    step_weights,
)

PROPERTY = settings(derandomize=True, max_examples=40)
seeds = st.integers(0, 2**31 - 1)


def random_pairs(seed: int, count: int = 12, spread: float = 2e-3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old, change, advantage = torch.randn((3, count), generator=generator)
    return old + spread * change, old, advantage


def slow_surrogate(log_prob: Tensor, old: Tensor, advantage: Tensor, c: float) -> tuple[float, int]:
    total, num_cut = 0.0, 0
    for new, before, a in zip(log_prob.tolist(), old.tolist(), advantage.tolist(), strict=True):
        ratio = math.exp(new - before)
        clipped = min(max(ratio, 1 - c), 1 + c)
        total += max(-a * ratio, -a * clipped)
        num_cut += (a > 0 and ratio > 1 + c) or (a < 0 and ratio < 1 - c)
    return total / len(log_prob), num_cut


class TestClippedSurrogate:
    def test_golden(self, golden: dict[str, Any]) -> None:
        case = golden["clipped_surrogate"]
        log_prob, old = torch.tensor(case["log_prob"]), torch.tensor(case["old_log_prob"])
        advantage = torch.tensor(case["advantage"])
        loss, _ = clipped_surrogate(log_prob, old, advantage, case["clip_range"])
        assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
        low = advantage.bfloat16()
        rounded, _ = clipped_surrogate(log_prob, old, low, case["clip_range"])
        full, _ = clipped_surrogate(log_prob, old, low.float(), case["clip_range"])
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded, full)

    @PROPERTY
    @given(seed=seeds, clip_range=st.sampled_from([1e-4, 1e-3, 0.2]))
    def test_equals_a_slow_loop(self, seed: int, clip_range: float) -> None:
        log_prob, old, advantage = random_pairs(seed)
        loss, stats = clipped_surrogate(log_prob, old, advantage, clip_range)
        expected, num_cut = slow_surrogate(
            log_prob.double(), old.double(), advantage.double(), clip_range
        )
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        assert stats["clip_fraction"].item() == pytest.approx(num_cut / 12, abs=1e-6)

    def test_default_clip_range_is_the_papers(self) -> None:
        log_prob, old, advantage = random_pairs(0)
        default, _ = clipped_surrogate(log_prob, old, advantage)
        assert torch.equal(default, clipped_surrogate(log_prob, old, advantage, 1e-4)[0])
        assert not torch.equal(default, clipped_surrogate(log_prob, old, advantage, 1e-3)[0])

    @PROPERTY
    @given(seed=seeds)
    def test_gradient_is_minus_a_r_or_zero_where_clipped(self, seed: int) -> None:
        log_prob, old, advantage = random_pairs(seed)
        log_prob.requires_grad_()
        loss, _ = clipped_surrogate(log_prob, old, advantage, 1e-3)
        (gradient,) = torch.autograd.grad(loss, log_prob)
        ratio = (log_prob - old).exp().detach()
        cut = ((advantage > 0) & (ratio > 1 + 1e-3)) | ((advantage < 0) & (ratio < 1 - 1e-3))
        expected = torch.where(cut, 0.0, -advantage * ratio / 12)
        torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=1e-5)
        assert torch.equal(gradient == 0, cut)

    def test_pinned_ratio_gives_the_policy_gradient(self) -> None:
        log_prob, _, advantage = random_pairs(3)
        log_prob.requires_grad_()
        loss, stats = clipped_surrogate(log_prob, log_prob.detach(), advantage)
        (gradient,) = torch.autograd.grad(loss, log_prob)
        torch.testing.assert_close(gradient, -advantage / 12, atol=1e-7, rtol=1e-6)
        assert loss.item() == pytest.approx(-advantage.mean().item(), abs=1e-6)
        assert stats["ratio_abs_dev"] == 0
        assert stats["clip_fraction"] == 0

    def test_stats_are_detached_means(self) -> None:
        log_prob = torch.tensor([0.0, math.log(1.5), math.log(0.9)], requires_grad=True)
        _, stats = clipped_surrogate(log_prob, torch.zeros(3), torch.tensor([1.0, 1.0, 1.0]))
        assert set(stats) == {"ratio_mean", "ratio_abs_dev", "clip_fraction"}
        assert not any(value.requires_grad for value in stats.values())
        assert stats["ratio_mean"].item() == pytest.approx(3.4 / 3)
        assert stats["ratio_abs_dev"].item() == pytest.approx(0.2)
        assert stats["clip_fraction"].item() == pytest.approx(1 / 3)

    @PROPERTY
    @given(seed=seeds, cut=st.integers(1, 11))
    def test_uneven_micro_batches_add_up_to_the_whole(self, seed: int, cut: int) -> None:
        log_prob, old, advantage = random_pairs(seed)
        whole, _ = clipped_surrogate(log_prob, old, advantage)
        parts = [
            clipped_surrogate(log_prob[part], old[part], advantage[part], denominator=12)[0]
            for part in (slice(cut), slice(cut, None))
        ]
        torch.testing.assert_close(sum(parts), whole, atol=1e-7, rtol=1e-5)

    def test_pairs_may_have_any_shape(self) -> None:
        new, old, advantage = random_pairs(4)
        flat, _ = clipped_surrogate(new, old, advantage)
        table, _ = clipped_surrogate(new.reshape(3, 4), old.reshape(3, 4), advantage.reshape(3, 4))
        torch.testing.assert_close(flat, table)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"old_log_prob": torch.zeros(4, 1)}, "old_log_prob must have log_prob's shape"),
            ({"advantage": torch.zeros(1)}, "advantage must have log_prob's shape"),
            ({"log_prob": torch.zeros(4).bfloat16()}, "log_prob must be float32"),
            ({"old_log_prob": torch.zeros(4).half()}, "old_log_prob must be float32"),
            ({"clip_range": 0.0}, "clip_range must lie in"),
            ({"clip_range": 1.0}, "clip_range must lie in"),
            ({"denominator": 0}, "denominator must be positive"),
        ],
    )
    def test_bad_arguments_are_named(self, change: dict[str, Any], message: str) -> None:
        arguments: dict[str, Any] = {
            name: torch.zeros(4) for name in ("log_prob", "old_log_prob", "advantage")
        }
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(clipped_surrogate)(**(arguments | change))


def slow_masked(
    log_prob: Tensor, old: Tensor, advantage: Tensor, divergence: Tensor, threshold: float
) -> tuple[float, int]:
    total, num_cut = 0.0, 0
    for new, before, a, d in zip(
        *(x.tolist() for x in (log_prob, old, advantage, divergence)), strict=True
    ):
        is_far, goes_on = d >= threshold, (new - before) * a > 0
        num_cut += is_far and goes_on
        total += 0.0 if is_far and goes_on else -a * math.exp(new - before)
    return total / len(log_prob), num_cut


class TestMaskedSurrogate:
    @PROPERTY
    @given(seed=seeds, threshold=st.sampled_from([1e-6, 1e-5, 1e-3]))
    def test_equals_a_slow_loop(self, seed: int, threshold: float) -> None:
        log_prob, old, advantage = random_pairs(seed)
        spread = torch.randn(12, generator=torch.Generator().manual_seed(seed + 1))
        divergence = 1e-5 * spread.exp()
        loss, stats = masked_surrogate(log_prob, old, advantage, divergence, threshold)
        expected, num_cut = slow_masked(
            log_prob.double(), old.double(), advantage.double(), divergence.double(), threshold
        )
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        assert stats["clip_fraction"].item() == pytest.approx(num_cut / 12)
        assert stats["rollout_kl"].item() == pytest.approx(divergence.mean().item())

    def test_only_who_goes_further_from_afar_has_no_gradient(self) -> None:
        """Far or near, probable or not, good or bad: two of eight are cut."""
        far, near = 1e-4, 1e-6
        log_prob = torch.tensor([0.1, -0.1, 0.1, -0.1] * 2, requires_grad=True)
        advantage = torch.tensor([1.0, 1.0, -1.0, -1.0] * 2)
        divergence = torch.tensor([far] * 4 + [near] * 4)
        loss, _ = masked_surrogate(log_prob, torch.zeros(8), advantage, divergence, 1e-5)
        loss.backward()
        assert log_prob.grad is not None
        expected = -advantage * log_prob.detach().exp() / 8
        expected[[0, 3]] = 0
        torch.testing.assert_close(log_prob.grad, expected)

    def test_on_policy_it_is_the_clipped_loss(self) -> None:
        """Where nothing has moved, both are the policy gradient."""
        sample, _, mean, _ = policy_step(0.3, batch=16)
        gradients = []
        for loss_of in (
            lambda x, d, a: masked_surrogate(x, x.detach(), a, d, 1e-5),
            lambda x, d, a: clipped_surrogate(x, x.detach(), a),
        ):
            moved = mean.clone().requires_grad_()
            log_prob = gaussian_log_prob(sample, moved, 0.3)
            divergence = gaussian_kl(moved.detach(), mean, 0.3)
            loss_of(log_prob, divergence, torch.linspace(-1, 1, 16))[0].backward()
            gradients.append(moved.grad)
        assert torch.equal(*gradients)

    def test_parts_add_up_to_the_whole(self) -> None:
        log_prob, old, advantage = random_pairs(0)
        divergence = torch.linspace(0, 2e-5, 12)
        whole, _ = masked_surrogate(log_prob, old, advantage, divergence, 1e-5)
        parts = [
            masked_surrogate(*(x[rows] for x in (log_prob, old, advantage, divergence)), 1e-5, 12)
            for rows in (slice(5), slice(5, 12))
        ]
        assert sum(loss for loss, _ in parts).item() == pytest.approx(whole.item(), abs=1e-6)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"threshold": 0.0}, "threshold must be positive"),
            ({"denominator": 0}, "denominator must be positive"),
            ({"divergence": torch.zeros(3)}, "divergence must have log_prob's shape"),
        ],
    )
    def test_bad_arguments_are_named(self, change: dict[str, Any], message: str) -> None:
        names = ("log_prob", "old_log_prob", "advantage", "divergence")
        arguments: dict[str, Any] = {name: torch.zeros(4) for name in names} | {"threshold": 1e-5}
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(masked_surrogate)(**(arguments | change))


def policy_step(
    std: float | Tensor, batch: int = 4096, dims: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A rollout sample x', its noise, and the old and new means, which differ by a fixed offset."""
    generator = torch.Generator().manual_seed(0)
    old_mean, noise = torch.randn((2, batch, dims), generator=generator)
    scale = std[:, None] if isinstance(std, Tensor) else std
    offset = 0.01 * torch.randn(dims, generator=generator)
    return old_mean + scale * noise, noise, old_mean, old_mean + offset


class TestNormalizeRatio:
    @pytest.mark.parametrize("std", [0.05, 0.5, torch.full((4096,), 0.2)])
    def test_leaves_the_noise_projected_on_the_change_of_mean(self, std: float | Tensor) -> None:
        sample, noise, old_mean, mean = policy_step(std)
        log_prob = gaussian_log_prob(sample, mean, std)
        old_log_prob = gaussian_log_prob(sample, old_mean, std)
        result = normalize_ratio(log_prob, old_log_prob, mean, old_mean, std)
        expected = ((mean - old_mean) * noise).mean(dim=1)
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-4)

    def test_all_noise_levels_share_mean_and_spread(self) -> None:
        for std in (0.05, 0.5):
            sample, _, old_mean, mean = policy_step(std)
            log_prob = gaussian_log_prob(sample, mean, std)
            old_log_prob = gaussian_log_prob(sample, old_mean, std)
            normal = normalize_ratio(log_prob, old_log_prob, mean, old_mean, std)
            distance = (mean - old_mean)[0]
            spread = distance.norm().item() / 8
            assert normal.std().item() == pytest.approx(spread, rel=0.05)
            assert normal.mean().item() == pytest.approx(0, abs=4 * spread / 64)
            plain = log_prob - old_log_prob
            assert plain.std().item() == pytest.approx(spread / std, rel=0.05)
            bias = -distance.square().mean().item() / (2 * std**2)
            assert plain.mean().item() == pytest.approx(bias, abs=4 * spread / std / 64)

    def test_gradient_is_the_noise(self) -> None:
        sample, noise, old_mean, mean = policy_step(0.3, batch=3)
        mean.requires_grad_()
        log_prob = gaussian_log_prob(sample, mean, 0.3)
        old_log_prob = gaussian_log_prob(sample, old_mean, 0.3)
        normalize_ratio(log_prob, old_log_prob, mean, old_mean, 0.3).sum().backward()
        assert mean.grad is not None
        torch.testing.assert_close(mean.grad, noise / 8, atol=1e-5, rtol=1e-4)

    def test_takes_the_std_of_sde_moments_and_is_zero_on_policy(self) -> None:
        latents, velocity = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0))
        sigma, sigma_next = torch.tensor([0.9, 0.6, 0.3]), torch.tensor([0.8, 0.4, 0.2])
        mean, std = sde_moments(velocity, latents, sigma, sigma_next, noise_level=0.4)
        log_prob = gaussian_log_prob(mean + std, mean, std)
        result = normalize_ratio(log_prob, log_prob, mean, mean, std)
        assert torch.equal(result, torch.zeros(3))
        moved = normalize_ratio(
            gaussian_log_prob(mean + std, mean + 0.01, std), log_prob, mean + 0.01, mean, std
        )
        torch.testing.assert_close(moved, torch.full((3,), 0.01), atol=1e-5, rtol=1e-3)

    def test_bad_arguments_are_named(self) -> None:
        zeros, means = torch.zeros(2), torch.zeros(2, 3)
        with pytest.raises(ValueError, match="std must be positive"):
            normalize_ratio(zeros, zeros, means, means, 0.0)
        with pytest.raises(ValueError, match="log_prob must be float32"):
            normalize_ratio(zeros.bfloat16(), zeros, means, means, 1.0)
        with pytest.raises(ValueError, match="old_log_prob must have log_prob's shape"):
            inspect.unwrap(normalize_ratio)(zeros, torch.zeros(1), means, means, 1.0)


class TestNormExcess:
    @PROPERTY
    @given(seed=seeds)
    def test_equals_a_slow_loop(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        velocity, reference = torch.randn(2, 6, 3, 4, generator=generator)
        expected = []
        for new, old in zip(velocity.double(), reference.double(), strict=True):
            lengths = [math.sqrt(sum(x * x for x in v.flatten().tolist())) for v in (new, old)]
            expected.append(max(0.0, lengths[0] / lengths[1] - 1))
        assert norm_excess(velocity, reference).tolist() == pytest.approx(expected, abs=1e-5)

    def test_its_gradient_shortens_what_is_too_long_and_nothing_else(self) -> None:
        velocity = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 5.0]], requires_grad=True)
        reference = torch.tensor([[0.0, 4.0], [0.0, 4.0], [5.0, 0.0]])
        norm_excess(velocity, reference).sum().backward()
        assert velocity.grad is not None
        torch.testing.assert_close(velocity.grad[0], torch.tensor([0.6, 0.8]) / 4)
        assert velocity.grad[1].tolist() == [0, 0]

    def test_shapes_must_agree(self) -> None:
        with pytest.raises(ValueError, match="velocity and reference must have the same shape"):
            inspect.unwrap(norm_excess)(torch.zeros(2, 3), torch.zeros(1, 3))


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.2])
def test_step_weights_are_those_of_flow_grpos_own_step(noise_level: float) -> None:
    """As its sd3_sde_with_logprob.py has mean and noise, by hand: the mean moves by c per velocity
    and its log-probability by c / std."""
    sigmas = [1.0, 0.9, 0.7, 0.4, 0.1, 0.0]
    slopes, stds = [], []
    for step in range(4):
        now, dt = sigmas[step], sigmas[step] - sigmas[step + 1]
        rate = noise_level * math.sqrt(now / (1 - (sigmas[1] if now == 1 else now)))
        stds.append(rate * math.sqrt(dt))
        slopes.append(dt * (1 + rate**2 * (1 - now) / (2 * now)))
    for balance, wanted in (
        ("noise", stds),
        ("equal", [std / c for std, c in zip(stds, slopes, strict=True)]),
    ):
        found = step_weights(
            torch.tensor(sigmas), balance, dynamics="flow", noise_level=noise_level, steps=range(4)
        )
        mean = sum(wanted) / 4
        assert found.tolist() == pytest.approx([*(w / mean for w in wanted), 1.0], rel=1e-5)
