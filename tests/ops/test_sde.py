"""SDE moments, log-probs and KL: golden vectors, slow oracles, closed-form Gaussian flows."""

import inspect
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import customized_grpo
from customized_grpo.ops import (
    Dynamics,
    cps_log_prob,
    gaussian_kl,
    gaussian_log_prob,
    sde_moments,
    shifted_sigmas,
)

TOLERANCE = 1e-5
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
CASES = [
    (name, index)
    for name, count in [("dance", 4), ("flow", 4), ("cps", 2)]
    for index in range(count)
]


def load(case: dict[str, Any], key: str) -> Tensor:
    return torch.tensor(case[key], dtype=torch.float32).reshape(case["shape"])


def golden_moments(
    case: dict[str, Any], dynamics: Dynamics, velocity: Tensor, latents: Tensor
) -> tuple[Tensor, Tensor]:
    return sde_moments(
        velocity,
        latents,
        case["sigma"],
        case["sigma_next"],
        dynamics=dynamics,
        noise_level=case["noise_level"],
        sigma_max=case.get("sigma_max"),
    )


def random_pair(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


class TestGolden:
    def test_sigmas(self, golden: dict[str, Any]) -> None:
        for case in golden["sigmas"]:
            sigmas = shifted_sigmas(case["num_steps"], case["shift"])
            assert sigmas.dtype == torch.float32
            torch.testing.assert_close(
                sigmas, torch.tensor(case["sigmas"]), atol=TOLERANCE, rtol=TOLERANCE
            )

    def test_every_case_is_listed(self, golden: dict[str, Any]) -> None:
        stored = [(name, i) for name in ("dance", "flow", "cps") for i in range(len(golden[name]))]
        assert stored == CASES

    @pytest.mark.parametrize(("dynamics", "index"), CASES)
    def test_moments(self, golden: dict[str, Any], dynamics: Dynamics, index: int) -> None:
        case = golden[dynamics][index]
        mean, std = golden_moments(case, dynamics, load(case, "velocity"), load(case, "latents"))
        torch.testing.assert_close(mean, load(case, "mean"), atol=TOLERANCE, rtol=TOLERANCE)
        expected_std = torch.tensor(case["std"]).broadcast_to(case["shape"][0])
        torch.testing.assert_close(
            std.broadcast_to(case["shape"][0]), expected_std, atol=TOLERANCE, rtol=TOLERANCE
        )

    @pytest.mark.parametrize(("dynamics", "index"), CASES)
    def test_bfloat16_inputs_are_upcast_first(
        self, golden: dict[str, Any], dynamics: Dynamics, index: int
    ) -> None:
        case = golden[dynamics][index]
        velocity, latents = load(case, "velocity").bfloat16(), load(case, "latents").bfloat16()
        low = golden_moments(case, dynamics, velocity, latents)
        full = golden_moments(case, dynamics, velocity.float(), latents.float())
        for half_input, full_input in zip(low, full, strict=True):
            assert half_input.dtype == torch.float32
            assert torch.equal(half_input, full_input)

    @pytest.mark.parametrize("index", range(4))
    def test_dance_log_prob(self, golden: dict[str, Any], index: int) -> None:
        case = golden["dance"][index]
        sample, mean = load(case, "next_latents"), load(case, "mean")
        log_prob = gaussian_log_prob(sample, mean, case["std"])
        without_constants = log_prob + math.log(case["std"]) + HALF_LOG_2PI
        expected = torch.tensor(case["log_prob_without_constants"])
        # The stored mean has 9 digits but the density divides its error by std^2 (about 1 / 450).
        torch.testing.assert_close(without_constants, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("index", range(4))
    def test_flow_log_prob_from_moments(self, golden: dict[str, Any], index: int) -> None:
        case = golden["flow"][index]
        mean, std = golden_moments(case, "flow", load(case, "velocity"), load(case, "latents"))
        log_prob = gaussian_log_prob(load(case, "next_latents"), mean, std)
        torch.testing.assert_close(
            log_prob, torch.tensor(case["log_prob"]), atol=TOLERANCE, rtol=TOLERANCE
        )

    def test_log_prob_of_bfloat16_inputs(self, golden: dict[str, Any]) -> None:
        case = golden["flow"][2]
        sample, mean = load(case, "next_latents").bfloat16(), load(case, "mean").bfloat16()
        std = torch.tensor(case["std"])
        low, full = (
            gaussian_log_prob(sample, mean, std),
            gaussian_log_prob(sample.float(), mean.float(), std),
        )
        assert low.dtype == torch.float32
        assert torch.equal(low, full)
        assert torch.equal(cps_log_prob(sample, mean), cps_log_prob(sample.float(), mean.float()))
        assert torch.equal(
            gaussian_kl(sample, mean, std), gaussian_kl(sample.float(), mean.float(), std)
        )


class TestSchedule:
    def test_matches_the_definition_step_by_step(self) -> None:
        sigmas = shifted_sigmas(7, 3)
        for i in range(8):
            u = 1 - i / 7
            assert sigmas[i].item() == pytest.approx(3 * u / (1 + 2 * u), abs=1e-7)

    @pytest.mark.parametrize("num_steps", [1, 2, 25, 1000])
    @pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
    def test_falls_strictly_from_exactly_one_to_exactly_zero(
        self, num_steps: int, shift: float
    ) -> None:
        sigmas = shifted_sigmas(num_steps, shift)
        assert sigmas.shape == (num_steps + 1,)
        assert sigmas[0] == 1.0
        assert sigmas[-1] == 0.0
        assert bool((sigmas.diff() < 0).all())

    @pytest.mark.parametrize(
        ("num_steps", "shift", "name"), [(0, 1.0, "num_steps"), (4, 0.0, "shift")]
    )
    def test_names_the_argument_at_fault(self, num_steps: int, shift: float, name: str) -> None:
        with pytest.raises(ValueError, match=name):
            shifted_sigmas(num_steps, shift)


def slow_dance(
    x: float, v: float, sigma: float, sigma_next: float, eta: float
) -> tuple[float, float]:
    """The paper's own order of operations, one number at a time in float64."""
    step = sigma - sigma_next
    denoised = x - sigma * v
    score = -(x - (1 - sigma) * denoised) / sigma**2
    return x - step * v + 0.5 * eta**2 * step * score, eta * math.sqrt(step)


def slow_flow(
    x: float, v: float, sigma: float, sigma_next: float, a: float, sigma_max: float
) -> tuple[float, float]:
    step = sigma - sigma_next
    q = a * math.sqrt(sigma / (1 - (sigma_max if sigma == 1 else sigma)))
    mean = x * (1 - q**2 * step / (2 * sigma)) - v * (1 + q**2 * (1 - sigma) / (2 * sigma)) * step
    return mean, q * math.sqrt(step)


def slow_cps(x: float, v: float, sigma: float, sigma_next: float, a: float) -> tuple[float, float]:
    std = sigma_next * math.sin(a * math.pi / 2)
    denoised, noise = x - sigma * v, x + (1 - sigma) * v
    return (1 - sigma_next) * denoised + math.sqrt(sigma_next**2 - std**2) * noise, std


class TestMoments:
    @pytest.mark.parametrize("dynamics", ["dance", "flow", "cps"])
    @pytest.mark.parametrize(
        "pair", [(1.0, 0.9), (0.9, 0.85), (0.5, 0.2), (0.05, 0.01), (0.1, 0.0)]
    )
    def test_equal_a_slow_scalar_oracle(
        self, dynamics: Dynamics, pair: tuple[float, float]
    ) -> None:
        latents, velocity = random_pair(2, 3, 2)
        mean, std = sde_moments(
            velocity, latents, *pair, dynamics=dynamics, noise_level=0.6, sigma_max=0.9
        )
        for index in np.ndindex(2, 3, 2):
            x, v = latents[index].item(), velocity[index].item()
            match dynamics:
                case "dance":
                    expected = slow_dance(x, v, *pair, 0.6)
                case "flow":
                    expected = slow_flow(x, v, *pair, 0.6, 0.9)
                case _:
                    expected = slow_cps(x, v, *pair, 0.6)
            assert mean[index].item() == pytest.approx(expected[0], abs=2e-5, rel=1e-5)
            assert std.item() == pytest.approx(expected[1], abs=1e-6)

    @pytest.mark.parametrize("dynamics", ["dance", "flow", "cps"])
    def test_without_noise_is_the_ode(self, dynamics: Dynamics) -> None:
        latents, velocity = random_pair(3, 5)
        ode_mean, ode_std = sde_moments(velocity, latents, 0.8, 0.6, dynamics="ode", noise_level=0)
        mean, std = sde_moments(velocity, latents, 0.8, 0.6, dynamics=dynamics, noise_level=0)
        torch.testing.assert_close(mean, ode_mean, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(ode_mean, latents - 0.2 * velocity, atol=1e-6, rtol=1e-6)
        assert std == 0.0
        assert ode_std == 0.0

    @pytest.mark.parametrize("dynamics", ["dance", "flow", "cps", "ode"])
    def test_one_sigma_per_sample_equals_one_call_per_sample(self, dynamics: Dynamics) -> None:
        latents, velocity = random_pair(3, 4, 2)
        sigma, sigma_next = torch.tensor([1.0, 0.7, 0.3]), torch.tensor([0.9, 0.5, 0.0])
        options: dict[str, Any] = {"dynamics": dynamics, "noise_level": 0.5, "sigma_max": 0.9}
        mean, std = sde_moments(velocity, latents, sigma, sigma_next, **options)
        assert std.shape == (3, 1, 1)
        for b in range(3):
            alone_mean, alone_std = sde_moments(
                velocity[b : b + 1], latents[b : b + 1], sigma[b], sigma_next[b].item(), **options
            )
            assert alone_std.shape == ()
            torch.testing.assert_close(mean[b : b + 1], alone_mean, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(std[b].squeeze(), alone_std, atol=1e-7, rtol=1e-6)

    @pytest.mark.parametrize("dynamics", ["dance", "flow", "cps", "ode"])
    def test_gradient_reaches_the_velocity(self, dynamics: Dynamics) -> None:
        latents, velocity = random_pair(2, 3)
        velocity.requires_grad_()
        mean, _ = sde_moments(velocity, latents, 0.6, 0.5, dynamics=dynamics, noise_level=0.3)
        (gradient,) = torch.autograd.grad(mean.sum(), velocity)
        assert bool((gradient != 0).all())

    def test_float32_survives_autocast(self) -> None:
        latents, velocity = random_pair(2, 64)
        outside = sde_moments(velocity, latents, 0.6, 0.5, noise_level=0.4)
        with torch.autocast("cpu", torch.bfloat16):
            inside = sde_moments(velocity, latents, 0.6, 0.5, noise_level=0.4)
        assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"dynamics": "euler"}, "dynamics must be one of dance, flow, cps, ode, got 'euler'"),
            ({"noise_level": -0.1}, "noise_level must not be negative"),
            ({"noise_level": 1.5, "dynamics": "cps"}, r"noise_level must lie in \[0, 1\] for cps"),
            ({"sigma": 1.0, "dynamics": "flow"}, "sigma_max must be given"),
            (
                {"sigma": 1.0, "dynamics": "flow", "sigma_max": 1.0},
                r"sigma_max must lie in \[0, 1\)",
            ),
            ({"sigma": 0.5, "sigma_next": 0.6}, "1 >= sigma > sigma_next >= 0"),
            ({"sigma": 800.0}, "1 >= sigma > sigma_next >= 0"),
            ({"sigma_next": -0.1}, "1 >= sigma > sigma_next >= 0"),
            ({"sigma": torch.full((5,), 0.9)}, "one value for each of the 2 samples"),
            ({"sigma": torch.tensor(0.9, dtype=torch.bfloat16)}, "sigma must be float32"),
        ],
    )
    def test_bad_arguments_are_named(self, change: dict[str, Any], message: str) -> None:
        latents, velocity = random_pair(2, 3)
        arguments: dict[str, Any] = {"sigma": 0.9, "sigma_next": 0.5, "noise_level": 0.4} | change
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(sde_moments)(velocity, latents, **arguments)


# Data N(m, s^2): the flow's marginals, velocity and trajectories are known in closed form.
DATA_MEAN, DATA_STD = 0.7, 0.5


def marginal_variance(sigma: float, data_std: float = DATA_STD) -> float:
    return (1 - sigma) ** 2 * data_std**2 + sigma**2


def exact_velocity(x: Tensor, sigma: float, data_std: float = DATA_STD) -> Tensor:
    """E[eps - x0 | x_sigma = x]."""
    covariance = sigma - (1 - sigma) * data_std**2
    return (
        covariance / marginal_variance(sigma, data_std) * (x - (1 - sigma) * DATA_MEAN) - DATA_MEAN
    )


def ode_error(num_steps: int) -> float:
    x = torch.tensor([[1.5], [-0.8]])
    expected = DATA_MEAN + DATA_STD * x
    sigmas = shifted_sigmas(num_steps).tolist()
    for sigma, sigma_next in pairwise(sigmas):
        x, _ = sde_moments(
            exact_velocity(x, sigma), x, sigma, sigma_next, dynamics="ode", noise_level=0
        )
    return (x - expected).abs().max().item()


def final_variance(
    dynamics: Dynamics, sigmas: list[float], noise_level: float, data_std: float = DATA_STD
) -> float:
    """Propagates mean and variance exactly: on Gaussian data every kernel is linear-Gaussian."""
    variance, mean = marginal_variance(sigmas[0], data_std), (1 - sigmas[0]) * DATA_MEAN
    for sigma, sigma_next in pairwise(sigmas):
        probe = torch.tensor([[mean], [mean + 1.0]])
        (image, shifted), std = sde_moments(
            exact_velocity(probe, sigma, data_std),
            probe,
            sigma,
            sigma_next,
            dynamics=dynamics,
            noise_level=noise_level,
            sigma_max=sigmas[1],
        )
        variance = (shifted - image).item() ** 2 * variance + std.item() ** 2
        mean = image.item()
    assert mean == pytest.approx((1 - sigmas[-1]) * DATA_MEAN, abs=0.05)
    return variance


class TestGaussianFlow:
    def test_ode_converges_at_first_order(self) -> None:
        errors = [ode_error(n) for n in (16, 32, 64, 128)]
        assert errors[0] > 1e-3
        for coarse, fine in pairwise(errors):
            assert coarse / fine == pytest.approx(2.0, abs=0.2)

    @pytest.mark.parametrize(("dynamics", "noise_level"), [("dance", 0.4), ("flow", 0.7)])
    def test_sde_preserves_the_marginal_variance_at_first_order(
        self, dynamics: Dynamics, noise_level: float
    ) -> None:
        # From 0.9: the flow kernel's first step out of pure noise has a variance error of its own
        # (a^4 / 4, see below) that no step size removes.
        errors = []
        for num_steps in (50, 100, 200):
            sigmas = torch.linspace(0.9, 0.1, num_steps + 1).tolist()
            variance = final_variance(dynamics, sigmas, noise_level)
            errors.append(abs(variance - marginal_variance(0.1)))
        assert errors[0] < 0.1 * marginal_variance(0.1)
        for coarse, fine in pairwise(errors):
            assert coarse / fine == pytest.approx(2.0, abs=0.25)

    def test_sde_noise_matters_in_the_variance_test(self) -> None:
        """The kernels differ visibly from the ODE, so preserving the variance is not trivial."""
        sigmas = torch.linspace(0.9, 0.1, 51).tolist()
        latents, velocity = random_pair(4, 8)
        for dynamics in ("dance", "flow"):
            mean, std = sde_moments(
                velocity, latents, sigmas[9], sigmas[10], dynamics=dynamics, noise_level=0.7
            )
            assert (mean - (latents - (sigmas[9] - sigmas[10]) * velocity)).abs().max() > 0.01
            assert std > 0.05

    @pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
    def test_cps_preserves_the_variance_of_one_image_exactly(self, noise_level: float) -> None:
        """For a single image x0 and x1 are exact, and steps of any size keep the variance."""
        sigmas = [1.0, 0.8, 0.45, 0.2]
        variance = final_variance("cps", sigmas, noise_level, data_std=0.0)
        assert variance == pytest.approx(0.2**2, rel=1e-5)

    @pytest.mark.parametrize("noise_level", [0.3, 0.7])
    def test_cps_loses_the_known_variance_on_a_gaussian(self, noise_level: float) -> None:
        """`V' = V - (1 - cos)^2 sigma^2 (1 - sigma^2 / V)` however small the step: no SDE."""
        sigma, sigma_next = 0.5, 0.4999
        before = marginal_variance(sigma)
        after = final_variance("cps", [sigma, sigma_next], noise_level)
        lost = (1 - math.cos(noise_level * math.pi / 2)) ** 2 * sigma**2 * (1 - sigma**2 / before)
        assert after - before == pytest.approx(-lost, abs=2e-4)

    @pytest.mark.parametrize(
        ("dynamics", "noise_level", "data_std"),
        [("dance", 0.4, DATA_STD), ("flow", 0.7, DATA_STD), ("cps", 0.7, 0.0)],
    )
    def test_monte_carlo_rollout_keeps_the_marginal(
        self, dynamics: Dynamics, noise_level: float, data_std: float
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        sigmas = torch.linspace(0.9, 0.1, 101).tolist()
        start = math.sqrt(marginal_variance(sigmas[0], data_std))
        x = (1 - sigmas[0]) * DATA_MEAN + start * torch.randn((20_000, 1), generator=generator)
        for sigma, sigma_next in pairwise(sigmas):
            mean, std = sde_moments(
                exact_velocity(x, sigma, data_std),
                x,
                sigma,
                sigma_next,
                dynamics=dynamics,
                noise_level=noise_level,
            )
            x = mean + std * torch.randn(x.shape, generator=generator)
        # Four standard errors of a sample variance of 20,000 (1 % each), plus the step error.
        assert x.var().item() == pytest.approx(marginal_variance(0.1, data_std), rel=0.06)
        assert x.mean().item() == pytest.approx(0.9 * DATA_MEAN, abs=0.03)

    def test_flow_leaves_pure_noise_with_its_known_excess_variance(self) -> None:
        sigmas = shifted_sigmas(100, 3).tolist()[:2]
        excess = final_variance("flow", sigmas, 0.7) - marginal_variance(sigmas[1])
        assert excess == pytest.approx(0.7**4 / 4, rel=0.1)


class TestLogProb:
    @pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4, 2, 2)])
    def test_equals_torch_distributions(self, shape: tuple[int, ...]) -> None:
        sample, mean = random_pair(*shape)
        log_prob = gaussian_log_prob(sample, mean, 0.3)
        expected = torch.distributions.Normal(mean, 0.3).log_prob(sample).reshape(3, -1).mean(1)
        torch.testing.assert_close(log_prob, expected, atol=1e-5, rtol=1e-5)

    def test_std_per_sample_in_every_accepted_form(self) -> None:
        sample, mean = random_pair(3, 3, 2)
        std = torch.tensor([0.1, 0.5, 2.0])
        expected = torch.cat(
            [gaussian_log_prob(sample[b : b + 1], mean[b : b + 1], std[b]) for b in range(3)]
        )
        for form in (std, std[:, None, None], std.double()):
            torch.testing.assert_close(gaussian_log_prob(sample, mean, form), expected)

    def test_cps_default_is_the_negative_mean_square(self) -> None:
        sample, mean = random_pair(3, 4, 2)
        expected = [
            -float(np.mean((s - m) ** 2)) for s, m in zip(sample.numpy(), mean.numpy(), strict=True)
        ]
        torch.testing.assert_close(cps_log_prob(sample, mean), torch.tensor(expected))

    @pytest.mark.parametrize(
        ("std", "message"),
        [
            (0.0, "std must be positive"),
            (torch.tensor([1.0, -1.0]), "std must be positive"),
            (torch.ones(7), "std must be a scalar or have one value for each of the 2 samples"),
            (torch.tensor(1.0, dtype=torch.float16), "std must be float32"),
        ],
    )
    def test_bad_std_is_named(self, std: float | Tensor, message: str) -> None:
        sample, mean = random_pair(2, 3)
        for operation in (gaussian_log_prob, gaussian_kl):
            with pytest.raises(ValueError, match=message):
                operation(sample, mean, std)

    @pytest.mark.parametrize("operation", [gaussian_log_prob, gaussian_kl, cps_log_prob])
    def test_shapes_never_broadcast(self, operation: Any) -> None:
        rest = () if operation is cps_log_prob else (1.0,)
        with pytest.raises(ValueError, match="same shape"):
            inspect.unwrap(operation)(torch.zeros(2, 3), torch.zeros(2, 1), *rest)

    def test_an_ode_step_has_no_log_prob(self) -> None:
        latents, velocity = random_pair(2, 3)
        mean, std = sde_moments(velocity, latents, 0.5, 0.4, dynamics="ode", noise_level=0.4)
        with pytest.raises(ValueError, match="leave it out of the trained steps"):
            gaussian_log_prob(mean, mean, std)

    def test_gradient_flows_through_the_mean(self) -> None:
        sample, mean = random_pair(2, 4)
        mean.requires_grad_()
        (gradient,) = torch.autograd.grad(gaussian_log_prob(sample, mean, 0.5).sum(), mean)
        difference = (sample - mean).detach()
        torch.testing.assert_close(gradient, difference / 0.5**2 / 4)
        (gradient,) = torch.autograd.grad(cps_log_prob(sample, mean).sum(), mean)
        torch.testing.assert_close(gradient, 2 * difference / 4)


class TestKL:
    def test_equals_torch_distributions(self) -> None:
        mean, reference = random_pair(3, 4, 2)
        std = torch.tensor([0.1, 0.5, 2.0])
        wide = std[:, None, None]
        normal = torch.distributions.Normal
        expected = torch.distributions.kl_divergence(normal(mean, wide), normal(reference, wide))
        torch.testing.assert_close(gaussian_kl(mean, reference, std), expected.mean(dim=(1, 2)))

    def test_gradient_flows_through_both_means(self) -> None:
        mean, reference = random_pair(2, 4)
        mean.requires_grad_()
        reference.requires_grad_()
        gaussian_kl(mean, reference, 0.5).sum().backward()
        expected = (mean - reference).detach() / 0.5**2 / 4
        assert mean.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(mean.grad, expected)
        torch.testing.assert_close(reference.grad, -expected)

    def test_is_zero_on_the_reference(self) -> None:
        mean, _ = random_pair(2, 4)
        assert torch.equal(gaussian_kl(mean, mean, 0.5), torch.zeros(2))


@pytest.mark.parametrize("dynamics", ["dance", "flow", "cps"])
@pytest.mark.parametrize("form", ["number", "0-d on cpu", "[B] on cpu", "[B] on device"])
def test_never_waits_for_an_accelerator(dynamics: Dynamics, form: str) -> None:
    """A meta tensor has no values to read, so a check that would synchronise fails here."""
    latents = torch.empty((2, 3, 4), device="meta", dtype=torch.bfloat16)
    sigma = {
        "number": 0.9,
        "0-d on cpu": torch.tensor(0.9),
        "[B] on cpu": torch.tensor([0.9, 0.8]),
        "[B] on device": torch.empty(2, device="meta"),
    }[form]
    mean, std = sde_moments(
        latents, latents, sigma, 0.5, dynamics=dynamics, noise_level=0.4, sigma_max=0.9
    )
    log_prob = gaussian_log_prob(latents, mean, std)
    kl = gaussian_kl(mean, latents, std)
    assert (mean + std * latents).device.type == log_prob.device.type == kl.device.type == "meta"


def test_import_needs_neither_diffusers_nor_transformers() -> None:
    code = (
        "import sys, customized_grpo.ops\n"
        "assert not {'diffusers', 'transformers', 'peft', 'accelerate'} & set(sys.modules)"
    )
    source = Path(customized_grpo.__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(source)}
    )
