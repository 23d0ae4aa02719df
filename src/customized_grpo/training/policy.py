"""The generator as a stochastic policy: a Gaussian over the next latents at every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from customized_grpo.config import RunConfig
from customized_grpo.generators.base import Conditioning, Generator
from customized_grpo.ops import (
    Dynamics,
    StepWeight,
    cps_log_prob,
    gaussian_log_prob,
    sde_moments,
    step_weights,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Rollout and update both go through ``transition`` with the same stored float32 latents, so
    that on policy the probability ratio is 1 up to the rounding of the model itself."""

    generator: Generator
    sigmas: Tensor
    """``[T + 1]`` float32 on the generator's device."""
    dynamics: Dynamics
    noise_level: float
    autocast: bool
    """Run transformer and decoder under bfloat16 autocast; moments and log-probs stay float32."""

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.sigmas) - 1

    def velocity(self, latents: Tensor, step_index: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity ``[M, *L]`` float32 at steps ``[M]``."""
        kind = latents.device.type
        # Its cache would keep the cast of every trained weight until the pass is over, also where
        # the weight itself is sharded and gone; and a pass uses a weight once, as a rule.
        with torch.autocast(kind, torch.bfloat16, enabled=self.autocast, cache_enabled=False):
            return self.generator.velocity(latents, self.sigmas[step_index], conditioning).float()

    def transition(
        self, latents: Tensor, step_index: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """Mean ``[M, *L]`` and std ``[M, 1, ...]`` of the latents after steps ``[M]``."""
        return self.moments(self.velocity(latents, step_index, conditioning), latents, step_index)

    def moments(
        self, velocity: Tensor, latents: Tensor, step_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same, where the velocity ``[M, *L]`` is known."""
        return sde_moments(
            velocity,
            latents,
            self.sigmas[step_index],
            self.sigmas[step_index + 1],
            dynamics=self.dynamics,
            noise_level=self.noise_level,
            sigma_max=self.sigmas[1],
        )

    def log_prob(self, next_latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Log-probability ``[M]``, mean over dimensions; Flow-CPS has its own definition."""
        if self.dynamics == "cps":
            return cps_log_prob(next_latents, mean)
        return gaussian_log_prob(next_latents, mean, std)

    def step_weights(self, balance: StepWeight, steps: range, ratio_norm: bool) -> Tensor:
        """A factor ``[T]`` on the advantage of every step of which ``steps`` may be trained."""
        return step_weights(
            self.sigmas,
            balance,
            dynamics=self.dynamics,
            noise_level=self.noise_level,
            steps=steps,
            ratio_norm=ratio_norm,
        ).to(self.sigmas.device)

    def euler(self, latents: Tensor, step: int, conditioning: Conditioning) -> Tensor:
        """Latents after one deterministic step."""
        index = torch.full((len(latents),), step, device=latents.device)
        velocity = self.velocity(latents, index, conditioning)
        return latents - (self.sigmas[step] - self.sigmas[step + 1]) * velocity

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` float32 in [0, 1]."""
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.autocast):
            return self.generator.decode(latents)


def make_policy(generator: Generator, config: RunConfig, num_steps: int | None = None) -> Policy:
    """The policy of a run; ``num_steps`` overrides the rollout's, for evaluation."""
    steps = num_steps or config.rollout.num_steps
    return Policy(
        generator=generator,
        sigmas=generator.sigmas(steps, config.rollout.shift).to(generator.device),
        dynamics=config.rollout.dynamics,
        noise_level=config.rollout.noise_level,
        autocast=config.mixed_precision == "bf16",
    )
