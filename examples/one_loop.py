"""GRPO with SARS and TDW on a flow-matching model: one file, one loop, in the order it happens.

    python examples/one_loop.py     # a few seconds on a CPU

The generator is a toy that draws points in the plane. Two rewards pull at them: "identity" wants
the first coordinate at .6, "prompt" the second at -.6. Put a transformer in its place, and scores
of pictures in theirs, and this is the method; ``customized_grpo/training/loop.py`` is the same loop
with everything that a long run on real models needs.

Axes: B samples, P prompts, G samples of a group, T steps; B = P G.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from customized_grpo.ops import (
    clipped_surrogate,
    combine_advantages,
    gaussian_log_prob,
    group_normalize,
    sde_moments,
    shifted_sigmas,
    synergy_bonus,
    tdw_weights,
)


def train(model, rewards, num_updates=60, num_prompts=8, group_size=12, num_steps=8):
    sigmas = shifted_sigmas(num_steps, shift=3.0)  # [T + 1]: from 1, noise, to 0, a picture
    weights = tdw_weights(sigmas[:-1])  # [T, 2]: the prompt counts more at high noise
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    groups = torch.arange(num_prompts).repeat_interleave(group_size)  # [B]
    noisy = range(num_steps - 1)  # the last step is deterministic and not trained

    def transition(x, step):  # the same function for rollout and update: the ratio is 1
        kind = {"dynamics": "dance" if step in noisy else "ode", "noise_level": 0.4}
        return sde_moments(model(x, sigmas[step]), x, sigmas[step], sigmas[step + 1], **kind)

    for _ in range(num_updates):
        # Rollout: a group starts from one noise, and every step adds noise of its own.
        x = torch.randn(num_prompts, 2)[groups]
        pairs = []
        with torch.no_grad():
            for step in range(num_steps):
                mean, std = transition(x, step)
                pairs.append((step, x, mean + std * torch.randn_like(x)))
                x = pairs[-1][2]

        # Advantages: each reward against its group; SARS joins them, TDW spreads them over steps.
        advantages = group_normalize(rewards(x), groups)  # [B, 2]
        per_step = combine_advantages(advantages, synergy_bonus(advantages), weights)  # [B, T]

        # Update: raise the log-prob of the steps that led to what was better than its group.
        for step, before, after in pairs[:-1]:  # any order: the step travels with its pair
            log_prob = gaussian_log_prob(after, *transition(before, step))
            loss, _ = clipped_surrogate(
                log_prob, log_prob.detach(), per_step[:, step], denominator=len(x) * len(noisy)
            )
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


class Points(nn.Module):
    """Velocity (noise - data) of points ``[B, 2]`` at a noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.net(torch.cat([x, sigma.expand(len(x), 1)], 1))


def fit(model: Points, num_updates: int = 300) -> None:
    """The pretrained generator: flow matching on a Gaussian of std .5 around 0."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(num_updates):
        data, noise, sigma = 0.5 * torch.randn(256, 2), torch.randn(256, 2), torch.rand(256, 1)
        predicted = model((1 - sigma) * data + sigma * noise, sigma)
        (predicted - (noise - data)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def draw(model: Points) -> Tensor:
    """512 points by Euler steps, always from the same noise."""
    x = torch.randn(512, 2, generator=torch.Generator().manual_seed(1))
    for now, then in pairwise(shifted_sigmas(8, shift=3.0)):
        x = x - (now - then) * model(x, now)
    return x


def rewards(x: Tensor) -> Tensor:
    """Scores ``[B, 2]``, columns identity and prompt."""
    return -(x - torch.tensor([0.6, -0.6])).square()


def main() -> tuple[Tensor, Tensor]:
    """Mean rewards before and after training."""
    torch.manual_seed(0)
    model = Points()
    fit(model)
    before = rewards(draw(model)).mean(0)
    train(model, rewards)
    after = rewards(draw(model)).mean(0)
    for name, was, now in zip(("identity", "prompt"), before, after, strict=True):
        print(f"{name}: {was:.3f} -> {now:.3f}")
    return before, after


if __name__ == "__main__":
    main()
