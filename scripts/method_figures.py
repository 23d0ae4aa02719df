"""Draws the pictures of docs/method.md from the package's own functions and the results in docs/.

python scripts/method_figures.py

Writes docs/pictures/method-*.svg and prints the numbers that the text quotes. Nothing is trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from customized_grpo.evaluation.report.figures import house_style, to_svg
from customized_grpo.evaluation.results import Results
from customized_grpo.files import write_atomic
from customized_grpo.ops import (
    Dynamics,
    combine_advantages,
    constant_weights,
    cosine_weights,
    linear_weights,
    sde_moments,
    shifted_sigmas,
    synergy_bonus,
    tdw_weights,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
PROMPT, IDENTITY, GREY, BLACK = "#0072B2", "#D55E00", "#666666", "#000000"
PAPER, PAPER_NOISE, PAPER_TRAINED = (25, 3.0), 0.4, 14  # T and shift; eta; 60 % of 24 steps
SPECIALIST, ALL_ROUNDER = (-0.8, 2.2), (0.7, 0.7)  # (identity, prompt): the same weighted sum


def totals(points: Tensor, gamma: float) -> Tensor:
    """Advantage ``[B]`` of (identity, prompt) pairs ``[B, 2]``, weighted 1:1."""
    weights = constant_weights(torch.ones(1))
    return combine_advantages(points, synergy_bonus(points, gamma=gamma), weights)[:, 0]


def step_gains(sigmas: Tensor, dynamics: Dynamics, noise_level: float) -> Tensor:
    """How much a change of the velocity moves the log-probability, step by step ``[T - 1]``.

    ``|d mean / d v| / std``: the factor that the SDE alone puts on a step's policy gradient; not of
    the last step, which is deterministic.
    """
    gains = []
    for step in range(len(sigmas) - 2):
        velocity = torch.zeros(1, 1, requires_grad=True)
        mean, std = sde_moments(
            velocity, torch.zeros(1, 1), sigmas[step], sigmas[step + 1],
            dynamics=dynamics, noise_level=noise_level, sigma_max=sigmas[1],
        )  # fmt: skip
        (slope,) = torch.autograd.grad(mean.sum(), velocity)
        gains.append(slope.abs().squeeze() / std)
    return torch.stack(gains)


def prompt_share(prompt_weights: Tensor, gains: Tensor, other: Tensor | None = None) -> float:
    """The prompt's part of all weight, every step counted by its gradient."""
    prompt = (prompt_weights * gains).sum()
    identity = ((1 - prompt_weights) * (gains if other is None else other)).sum()
    return (prompt / (prompt + identity)).item()


def measured_gradients() -> Tensor:
    """Columns sigma, prompt, identity and TDW's prompt weight of the table in docs/results.md."""
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    table, _, _ = text[text.index("| step | sigma | gradient, prompt |") :].partition("\n\n")
    rows = [line.split("|")[2:6] for line in table.splitlines()[2:]]
    return torch.tensor([[float(cell) for cell in row] for row in rows])


def weighted_sum(results: Results) -> Figure:
    """The plane of the two advantages: lines of equal total, without and with SARS."""
    figure, panels = _panels(2, (9.6, 4.4))
    cell = results.of(results.main)[0]
    samples = torch.tensor([cell.advantages[name] for name in ("identity", "prompt")])
    # Where two places are as good, a CPU's rounding chooses: no point of the grid has just a total
    # of a level's, and the labels are put on a line of their own.
    axis = torch.linspace(-3.1, 3, 37)
    labelled = torch.linspace(-2.2, 2.2, 441)[:, None] + torch.tensor([0.8, -0.8])
    grid = torch.cartesian_prod(axis, axis)  # (identity, prompt)
    for axes, gamma, title in zip(
        panels, (0.0, 0.4), ("weighted sum 1:1", "with SARS, gamma 0.4"), strict=True
    ):
        surface = totals(grid, gamma).view(37, 37)
        lines = axes.contour(
            axis, axis, surface, levels=torch.arange(-2, 2.1, 0.5).tolist(), colors=GREY,
            linewidths=0.8,
        )  # fmt: skip
        off = (totals(labelled, gamma)[:, None] - torch.tensor(lines.levels)).abs()
        axes.clabel(lines, fontsize=8, manual=labelled[off.argmin(0)].flip(1).tolist())
        axes.scatter(samples[1], samples[0], s=10, color="#56B4E9", lw=0)
        for point, name, side in (
            (SPECIALIST, "specialist", "right"),  # it lies near the frame
            (ALL_ROUNDER, "all-rounder", "center"),
        ):
            total = totals(torch.tensor([point]), gamma).item()
            axes.scatter(point[1], point[0], s=50, color=BLACK, zorder=3)
            axes.annotate(
                f"{name}: {total:+.2f}", (point[1], point[0]), xytext=(8 * (side == "right"), 8),
                ha=side, textcoords="offset points", bbox={"fc": "white", "ec": "none", "pad": 1},
            )  # fmt: skip
        axes.axhline(0, color=GREY, lw=0.6)
        axes.axvline(0, color=GREY, lw=0.6)
        axes.set(title=title, xlabel="prompt advantage", ylabel="identity advantage",
                 xlim=(-3, 3), ylim=(-3, 3))  # fmt: skip
    return figure


def time_weights(results: Results) -> Figure:
    """TDW over the paper's steps, and over the noise level where any schedule can read it."""
    figure, (over_steps, over_sigma) = _panels(2, (9.6, 3.8))
    weights = tdw_weights(shifted_sigmas(*PAPER)[:-1])[:, 1]
    over_steps.plot(range(len(weights)), weights, "o-", ms=4, color=PROMPT, label="prompt")
    over_steps.plot(range(len(weights)), 1 - weights, "o-", ms=4, color=IDENTITY, label="identity")
    over_steps.axhline(
        weights[:PAPER_TRAINED].mean().item(), color=GREY, ls="--", lw=1,
        label="prompt, released code:\nthe same at all steps, on average",
    )  # fmt: skip
    over_steps.set(title="T = 25, shift 3", xlabel="denoising step (0 = noisiest)", ylabel="weight")
    sigma = torch.linspace(0, 1, 401)
    over_sigma.plot(sigma, tdw_weights(sigma)[:, 1], color=PROMPT, label="tdw")
    over_sigma.plot(sigma, linear_weights(sigma)[:, 1], color=GREY, lw=1, label="linear")
    over_sigma.plot(sigma, cosine_weights(sigma)[:, 1], color=GREY, lw=1, ls=":", label="cosine")
    few = torch.tensor(read_sigmas(results))
    over_sigma.plot(few, tdw_weights(few)[:, 1], "s", color=BLACK, label="the 6 steps of the demo")
    over_sigma.invert_xaxis()
    over_sigma.set(title="any schedule", xlabel="noise level sigma", ylabel="weight of the prompt")
    for axes in (over_steps, over_sigma):
        axes.set_ylim(0.2, 0.95)
        axes.legend(fontsize=8, loc="upper right")
    return figure


def read_sigmas(results: Results) -> list[float]:
    """Noise levels at which the steps of the proof's runs start."""
    return results.of(results.main)[0].schedule["sigmas"][:-1]


def gradients(results: Results) -> Figure:
    """Measured policy gradients of the steps beside what the SDE alone makes of them."""
    figure, (emoji, paper) = _panels(2, (9.6, 3.8))
    sigma, prompt, identity, weights = measured_gradients().unbind(1)
    gains = step_gains(torch.tensor([*read_sigmas(results), 0.0]), "flow", 0.7)
    steps = torch.arange(len(sigma))
    for shift, name, values in ((-0.2, "prompt", prompt), (0.2, "identity", identity)):
        color = {"prompt": PROMPT, "identity": IDENTITY}[name]
        emoji.bar((steps + shift).tolist(), (values * 1e4).tolist(), 0.38, color=color, label=name)
    scale = 1e4 * prompt[0] / gains[0]
    emoji.plot(steps, gains * scale, "D--", color=BLACK, lw=1, label="computed, scaled")
    share = prompt_share(weights, prompt, identity)
    emoji.set(title=f"emoji world: the prompt has {share:.0%} of the weight",
              xlabel="denoising step", ylabel="policy gradient, measured, 1e-4")  # fmt: skip
    sigmas = shifted_sigmas(*PAPER)
    gains = step_gains(sigmas, "dance", PAPER_NOISE)
    weights = tdw_weights(sigmas[:-2])[:, 1]
    paper.plot(range(len(gains)), gains / gains[0], "D--", ms=4, color=BLACK, lw=1)
    share = prompt_share(weights, gains)
    paper.set(title=f"the paper's schedule: {share:.0%}, computed only",
              xlabel="denoising step", ylabel="computed from the SDE, first = 1")  # fmt: skip
    emoji.legend(fontsize=8)
    return figure


FIGURES = {
    "weighted-sum": weighted_sum,
    "time-weights": time_weights,
    "gradients": gradients,
}


def _panels(count: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False).flat)


def quoted(results: Results) -> dict[str, str]:
    """The numbers of docs/method.md, by what they are."""
    quantiles = torch.special.ndtri((torch.arange(1000) + 0.5) / 1000)
    gaussian = torch.cartesian_prod(quantiles, quantiles)  # random numbers differ between CPUs
    weights = tdw_weights(shifted_sigmas(*PAPER)[:-1])[:, 1]
    _, prompt, identity, emoji_weights = measured_gradients().unbind(1)
    paper = step_gains(shifted_sigmas(*PAPER), "dance", PAPER_NOISE)
    emoji = step_gains(torch.tensor([*read_sigmas(results), 0.0]), "flow", 0.7)
    both = torch.tensor([SPECIALIST, ALL_ROUNDER])
    return {
        "mean of S / gamma": f"{synergy_bonus(gaussian, gamma=1.0).mean():.2f}",
        "weighted sum of both": f"{totals(both, 0.0)[0]:.2f}",
        "specialist, all-rounder with SARS": "{:.2f}, {:.2f}".format(*totals(both, 0.4).tolist()),
        "TDW's prompt weight by shuffled position": f"{weights[:PAPER_TRAINED].mean():.3f}",
        "TDW's prompt weight, mean of 24 steps": f"{weights[:-1].mean():.2f}",
        "measured gradients, last to first": f"{prompt[-1] / prompt[0]:.1f}",
        "computed, last to first": f"{emoji[-1] / emoji[0]:.1f}",
        "prompt's share, measured": f"{prompt_share(emoji_weights, prompt, identity):.2f}",
        "prompt's share, computed": f"{prompt_share(emoji_weights, emoji):.2f}",
        "computed on the paper's schedule, last to first": f"{paper[-1] / paper[0]:.1f}",
        "prompt's share there": f"{prompt_share(weights[:-1], paper):.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=DOCS / "pictures", help="folder for the SVGs")
    args = parser.parse_args()
    results = Results.read(DOCS / "results" / "proof" / "results.json")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        with house_style():
            figure = draw(results)
        write_atomic(args.out / f"method-{name}.svg", to_svg(figure) + "\n")
    for what, number in quoted(results).items():
        print(f"{what}: {number}")


if __name__ == "__main__":
    main()
