"""What the shipped recipes do with the steps they have: both objectives lead in some of those that
are trained, and latents are as noisy as the model expects."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from helpers import ROOT
from torch import Tensor

from customized_grpo.config import (
    AdvantageConfig,
    ConstantSchedule,
    ForwardAlgorithm,
    LinearSchedule,
    RolloutConfig,
    RunConfig,
    TdwSchedule,
    load_config,
)
from customized_grpo.ops import sde_moments, shifted_sigmas
from customized_grpo.training.advantages import objective_weights, one_sided
from customized_grpo.training.rollout import noisy_steps
from customized_grpo.training.train import train

# Shift of each family's own schedule at 512 px, 1024 tokens.
MU = {
    "flux-kontext": 0.5 + (1024 - 256) * (1.15 - 0.5) / (4096 - 256),
    "flux3-klein": math.log(6.93),
    "qwen-image-2.1": 0.5 + (1024 - 256) * (1.15 - 0.5) / (4096 - 256),  # the pipeline's default
    "qwen-image-edit-plus": 0.5 + (1024 - 256) * (0.9 - 0.5) / (8192 - 256),
    "uno": 0.459,
}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
NOISY = [path for path in CONFIGS if load_config(path).rollout.dynamics != "ode"]


def sigmas_of(config: RunConfig) -> Tensor:
    rollout, generator = config.rollout, cast(Any, config.generator)
    if generator.type == "flux2-klein":
        mu = compute_empirical_mu(1024, rollout.num_steps)
    else:  # that of the embedded model's 16 tokens has no shift
        mu = 0.0 if generator.path == "embedded:generator" else MU[generator.type]
    return shifted_sigmas(rollout.num_steps, rollout.shift or math.exp(mu))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_prompt_and_identity_each_lead_somewhere(path: Path) -> None:
    config = load_config(path)
    sigmas, steps = sigmas_of(config), noisy_steps(config.rollout)
    if isinstance(config.algorithm, ForwardAlgorithm):  # trains at the noise levels of all
        steps = range(config.rollout.num_steps)
    assert one_sided(sigmas, steps, config.advantage) is None
    names = ("identity", "prompt")
    prompt = objective_weights(sigmas[:-1], config.advantage, names)[steps.start : steps.stop, 1]
    assert 0.4 < prompt.mean() < 0.6


@pytest.mark.parametrize("path", NOISY, ids=lambda path: path.stem)
def test_latents_are_as_noisy_as_the_model_expects(path: Path) -> None:
    """Of Gaussian data the best velocity is linear, and so the variance of latents is known. Flow
    .7 leaves the embedded recipe's six steps with 1.10; klein's four would have 1.18."""
    config = load_config(path)
    sigmas, rollout = sigmas_of(config).double(), config.rollout
    variance = torch.ones((), dtype=torch.float64)
    for step in noisy_steps(rollout):
        now, then = sigmas[step], sigmas[step + 1]
        one = torch.ones(1, 1, dtype=torch.float64)
        velocity = one * (now - (1 - now)) / ((1 - now) ** 2 + now**2)
        mean, std = sde_moments(
            velocity, one, now[None], then[None],
            dynamics=rollout.dynamics, noise_level=rollout.noise_level, sigma_max=sigmas[1],
        )  # fmt: skip
        variance = mean.square().sum() * variance + std.square().sum()
        assert (variance / ((1 - then) ** 2 + then**2)).sqrt() == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize(
    ("advantage", "leads"),
    [
        ({"schedule": TdwSchedule()}, "prompt has more weight than identity"),
        ({"schedule": LinearSchedule(high=0.4, low=0.1)}, "identity has more weight than prompt"),
        ({"schedule": LinearSchedule(high=0.6, low=0.0)}, None),
        ({"schedule": ConstantSchedule(prompt=0.7)}, None),  # as it was written
        ({"shaping": "synergy_only"}, None),  # which has no weighted sum
    ],
)
def test_a_schedule_beside_the_trained_steps_is_named(
    advantage: dict[str, Any], leads: str | None
) -> None:
    """At the noise levels of klein's own four steps, of which three are trained."""
    sigmas = torch.tensor([1.0, 0.9581, 0.884, 0.7175, 0.0])
    found = one_sided(sigmas, range(3), AdvantageConfig(**advantage))
    assert (found or "").startswith(f"advantage.schedule: {leads} in every step" if leads else "")
    assert (found is None) == (leads is None)


@pytest.mark.slow
def test_a_run_says_so_when_it_begins_and_when_it_goes_on(
    tiny_config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = LinearSchedule(high=0.9, low=0.6)
    config = dataclasses.replace(tiny_config, advantage=AdvantageConfig(schedule=schedule))
    train(config)
    assert caplog.text.count("prompt has more weight than identity in every step") == 1
    longer = dataclasses.replace(config.train, num_updates=3)
    train(dataclasses.replace(config, train=longer), resume=True)
    assert caplog.text.count("prompt has more weight than identity in every step") == 2


def test_the_window_is_what_is_trained() -> None:
    """Its steps alone count: here those in which the prompt leads."""
    sigmas = shifted_sigmas(25, 3.0)
    assert one_sided(sigmas, range(24), AdvantageConfig()) is None
    early = noisy_steps(RolloutConfig(window=(0, 5), num_trained_steps=5))
    assert "0.70 to 0.70" in (one_sided(sigmas, early, AdvantageConfig()) or "")
