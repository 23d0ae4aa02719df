"""Figures of results, by matplotlib: one function a figure, None where there is nothing to show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from customized_grpo.config import read_config
from customized_grpo.config.names import BASE, COPY, TRUTH, UNRELATED
from customized_grpo.evaluation.results import COPY_GAP, Cell, Results
from customized_grpo.evaluation.statistics import Estimate, over_seeds
from customized_grpo.ops import shaping_bonus
from customized_grpo.rewards.truth import SHARES
from customized_grpo.training.rollout import noisy_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers too; the main method gets black.
_PALETTE = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C00", "#7F3C8D",
            "#666666", "#7A4A21")  # fmt: skip
_MARKERS = "osD^vP*Xph"
_MANY = 6  # methods: bands of more of them are one brown, and tables have the intervals
_FLAT = 0.01  # of a similarity: curves are not drawn larger than within it


def house_style() -> AbstractContextManager[None]:
    """What all figures of this project have in common, while they are drawn and saved."""
    import matplotlib as mpl

    settings: Any = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
        "legend.frameon": False,
        "text.parse_math": False,  # labels are people's, who may write a $
        "svg.hashsalt": "customized-grpo",  # the same figure gives the same bytes
    }
    return mpl.rc_context(settings)


def figures(results: Results) -> dict[str, Figure]:
    """File name -> figure, of those the results have numbers for."""
    draws = (
        right_ranking, right_plane, right_over_training, plane, learning_curves, quadrants,
        schedule, conflicts,
    )  # fmt: skip
    with house_style():
        drawn = {draw.__name__.replace("_", "-"): draw(results) for draw in draws}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def to_svg(figure: Figure) -> str:
    """SVG element without prolog, the same bytes for the same figure."""
    buffer = StringIO()
    with house_style():
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def to_png(figure: Figure) -> bytes:
    """PNG at 150 dpi."""
    buffer = BytesIO()
    with house_style():
        figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    return buffer.getvalue()


def has_bands(results: Results) -> bool:
    """Whether curves are drawn with their intervals over the seeds."""
    return len(results.methods) <= _MANY


def right_ranking(results: Results) -> Figure | None:
    """Methods by their share of pictures right in both, the best on top; a dot is a seed."""
    name = "both_right"
    found = {m: e for m in results.methods if (e := results.over_seeds(m, name)) is not None}
    if len(found) < 3:
        return None
    ranked = sorted(found, key=lambda method: found[method].mean, reverse=True)
    figure, (axes,) = _subplots(1, 1, (7, 0.9 + 0.27 * len(ranked)))
    for row, method in enumerate(ranked):
        color = "black" if method == results.main else _PALETTE[1]
        mean = found[method].within(0, 1).as_drawn()
        axes.errorbar(mean.mean, row, xerr=_bar(mean), fmt="o", ms=6, capsize=2, lw=1, color=color)
        seeds = [c.judgement.means[name] for c in results.of(method).values()]
        axes.scatter(seeds, [row] * len(seeds), s=12, color="#999999", zorder=3)
    base = results.yardstick.models.get(BASE)
    if base is not None and name in base.means:
        axes.axvline(base.means[name], color="#444444", lw=1, ls="--")
        place = (base.means[name], 1)
        axes.annotate(BASE, place, xycoords=("data", "axes fraction"), ha="center", va="bottom")
    axes.set_yticks(range(len(ranked)), [results.labels[method] for method in ranked])
    axes.set(xlabel="right in both", ylim=(len(ranked) - 0.4, -0.6))
    axes.set_xlim(left=-0.02)
    axes.grid(visible=False, axis="y")
    return figure


def right_plane(results: Results) -> Figure | None:
    """The (subject right, prompt right) plane: where every method ends, and what it came from."""
    drawn = _plane(results, "subject_right", "prompt_right")
    if drawn is None:
        return None
    figure, axes, _ = drawn
    axes.set(xlabel="subject right", ylabel="prompt right")
    axes.set(xlim=(-0.03, 1.06), ylim=(-0.03, 1.06), aspect="equal")
    return figure


def plane(results: Results) -> Figure | None:
    """The (prompt, identity) plane, from the base and the truth to the methods."""
    leading = results.yardstick.leading
    drawn = _plane(results, leading.get("prompt", ""), leading.get("identity", ""))
    if drawn is None:
        return None
    figure, axes, points = drawn
    axes.set(xlabel="prompt", ylabel="identity")
    xs, ys = zip(*points, strict=True)
    for values, limit in ((xs, axes.set_xlim), (ys, axes.set_ylim)):
        margin = 0.18 * (max(values) - min(values)) + 1e-4
        limit(min(values) - margin, max(values) + margin)
    axes.locator_params(nbins=5)
    return figure


def _plane(
    results: Results, x_name: str, y_name: str
) -> tuple[Figure, Axes, list[tuple[float, float]]] | None:
    """Methods and anchors by two measures, and where base, truth, methods and the ends of their
    bars are; None where no anchor has both. What could not be scored is left out."""
    means = {name: judged.means for name, judged in results.yardstick.models.items()}
    places = {n: (m.get(x_name, math.nan), m.get(y_name, math.nan)) for n, m in means.items()}
    known = {name: place for name, place in places.items() if all(map(math.isfinite, place))}
    if not known:
        return None
    from matplotlib.patheffects import withStroke

    figure, (axes,) = _subplots(1, 1, (6, 5.2))
    points = [known[name] for name in (BASE, TRUTH) if name in known]
    for method, style in _styles(results).items():
        x, y = (_with_error(results, method, name) for name in (x_name, y_name))
        if x is not None and y is not None:
            bars = {"xerr": _bar(x), "yerr": _bar(y)}
            axes.errorbar(x.mean, y.mean, ms=7, capsize=2, lw=1, zorder=4, **bars, **style)
            points += [(x.mean, y.mean), *_corners(x, y)]
    grey = "#444444"
    for name, marker in ((COPY, "s"), (TRUTH, "*"), (UNRELATED, "x"), (BASE, "o")):
        if name in known:
            axes.scatter(*known[name], marker=marker, s=70, color=grey, zorder=3)
            text = axes.annotate(
                name, known[name], textcoords="offset points", xytext=(7, 5), color=grey, zorder=5
            )
            text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    _legend_below(figure, axes)
    return (figure, axes, points) if points else None


def _with_error(results: Results, method: str, name: str) -> Estimate | None:
    """A measure's mean with its interval over the seeds; of one seed, which has none, with that of
    its change from the base over the examples."""
    own = results.over_seeds(method, name)
    change = results.over_seeds(method, name, minus=BASE)
    if own is None or own.low is not None or change is None or math.isnan(change.half_width):
        return own and own.as_drawn()
    half = change.half_width
    return replace(own, low=own.mean - half, high=own.mean + half)


def _corners(x: Estimate, y: Estimate) -> list[tuple[float, float]]:
    ends = zip((x.low, x.high), (y.low, y.high), strict=True)
    return [(a, b) for a, b in ends if a is not None and b is not None]


def right_over_training(results: Results) -> Figure | None:
    """Shares of right validation examples, and of copies, over the updates."""
    names = {f"validation/share/{name}": name.replace("_", " ") for name in SHARES}
    drawn = {n: title for n, title in names.items() if any(n in c.curve for c in results.cells)}
    if not drawn:
        return None
    filled = has_bands(results)
    figure, panels = _subplots(math.ceil(len(drawn) / 2), min(2, len(drawn)), (6, 5.6))
    for axes, (name, title) in zip(panels, drawn.items(), strict=False):
        means = [0.05]
        for method, style in _styles(results).items():
            curves = [c.curve for c in results.of(method).values() if name in c.curve]
            if curves:
                x, own = curves[0]["update"], [c[name] for c in curves]
                means += _band(axes, x, own, style, (0, 1), filled=filled)
        axes.set_ylim(0, min(1.02, 1.2 * max(means)))
        axes.set(title=title, xlabel="update")
    for axes in panels[len(drawn) :]:
        axes.remove()
    _legend_below(figure, panels[0])
    return figure


def learning_curves(results: Results) -> Figure | None:
    """Gains on validation examples over the updates: by the evaluators, dashed by the rewards; and
    that of the copy gap, where it is known."""
    yardstick = results.yardstick
    rewards = {o: f"validation/reward/{name}" for name, o in reversed(yardstick.rewards.items())}
    shown = {o: f"validation/{yardstick.leading.get(o)}" for o in ("prompt", "identity")}
    shown["copy gap"] = COPY_GAP
    drawn = {o: n for o, n in shown.items() if any(n in c.curve for c in results.cells)}
    if not drawn:
        return None
    filled = has_bands(results)
    figure, panels = _subplots(1, len(drawn), (6, 3.8))
    for axes, (objective, name) in zip(panels, drawn.items(), strict=True):
        for method, style in _styles(results).items():
            curves = [c.curve for c in results.of(method).values() if name in c.curve]
            if curves:
                _curve(axes, curves, name, rewards.get(objective, ""), style, filled=filled)
        axes.axhline(0, color="#444444", lw=0.8)
        low, high = axes.get_ylim()  # a change of next to nothing is to look like one
        axes.set(title=objective, xlabel="update", ylim=(min(low, -_FLAT), max(high, _FLAT)))
    panels[0].set_ylabel("gain on validation examples")
    _legend_below(figure, panels[0])
    return figure


def _curve(
    axes: Axes,
    curves: Sequence[dict[str, list[float]]],
    name: str,
    reward: str,
    style: dict,
    *,
    filled: bool,
) -> None:
    updates = curves[0]["update"]
    _band(axes, updates, [_gains(curve[name]) for curve in curves], style, filled=filled)
    dashed = _means([_gains(curve[reward]) for curve in curves if reward in curve])
    if dashed:
        axes.plot(updates[: len(dashed)], dashed, lw=0.9, ls="--", color=style["color"])


def _gains(values: Sequence[float]) -> list[float]:
    return [value - values[0] for value in values]


def quadrants(results: Results) -> Figure | None:
    """Group advantages of the main method's first rollouts, coloured by the bonus they got."""
    parts = [_advantages_and_bonus(cell) for cell in results.of(results.main).values()]
    known = [part for part in parts if part is not None]
    if not known:
        return None
    advantages, bonus = (torch.cat(tensors) for tensors in zip(*known, strict=True))
    figure, (axes,) = _subplots(1, 1, (5.6, 4.8))
    limit = max(bonus.abs().max().item(), 1e-3)
    dots = axes.scatter(
        advantages[:, 1], advantages[:, 0], c=bonus, cmap="RdBu", vmin=-limit, vmax=limit, s=22,
        edgecolors="#555555", linewidths=0.3,
    )  # fmt: skip
    axes.axhline(0, color="#444444", lw=1)
    axes.axvline(0, color="#444444", lw=1)
    for x, y, title in (
        (1, 1, "both good"), (-1, -1, "both bad"), (-1, 1, "conflicted"), (1, -1, "conflicted"),
    ):  # fmt: skip
        inside = (advantages[:, 1].sign() == x) & (advantages[:, 0].sign() == y)
        axes.text(
            0.5 + 0.48 * x, 0.5 + 0.47 * y, f"{title}, {inside.float().mean().item():.0%}",
            ha="right" if x > 0 else "left", va="center", transform=axes.transAxes,
        )  # fmt: skip
    axes.set_xlabel("prompt advantage")
    axes.set_ylabel("identity advantage")
    axes.set_title(f"{len(advantages)} samples, {results.labels[results.main]}")
    figure.colorbar(dots, ax=axes, label="bonus")
    return figure


def _advantages_and_bonus(cell: Cell) -> tuple[Tensor, Tensor] | None:
    """``[B, 2]`` (identity, prompt) advantages of the first rollout and their bonus ``[B]``."""
    if not {"identity", "prompt"} <= cell.advantages.keys():
        return None
    config = read_config(cell.config, f"{cell.method}/seed{cell.seed}")
    pairs = zip(cell.advantages["identity"], cell.advantages["prompt"], strict=True)
    advantages = torch.tensor([[math.nan if a is None else a for a in pair] for pair in pairs])
    settings = config.advantage
    bonus = shaping_bonus(
        settings.find_shaping(),
        advantages,
        gamma=settings.strength(),
        center=settings.center,
        group_ids=torch.arange(len(advantages)) // config.rollout.group_size,
    )
    valid = ~advantages.isnan().any(1)
    return advantages[valid], bonus[valid]


def schedule(results: Results) -> Figure | None:
    """Weight of the prompt at every denoising step; methods of equal weights share a line."""
    lines: dict[tuple[tuple[int, float], ...], list[str]] = {}
    num_steps = 0
    for method in _styles(results):
        cell = next(iter(results.of(method).values()))
        if cell.schedule and "prompt" in cell.schedule["objectives"]:
            num_steps = max(num_steps, len(cell.schedule["weights"]))
            lines.setdefault(_trained_weights(cell), []).append(method)
    if not lines:
        return None
    figure, (axes,) = _subplots(1, 1, (6, 3.8))
    styles = _styles(results)
    for points, methods in lines.items():
        chosen = results.main if results.main in methods else methods[0]
        label = ", ".join(results.labels[method] for method in methods)
        color = styles[chosen]["color"]
        axes.step(*zip(*points, strict=True), where="mid", marker=".", label=label, color=color)
    axes.set_xlabel("denoising step (0 = noisiest)")
    axes.set_ylabel("weight of the prompt")
    axes.set(xlim=(-0.5, num_steps - 0.5), ylim=(-0.05, 1.05))
    _legend_below(figure, axes, columns=1)
    return figure


def _trained_weights(cell: Cell) -> tuple[tuple[int, float], ...]:
    """(step, weight of the prompt) of the steps that can be trained; with NFT, which trains noise
    levels, of all."""
    rollout = read_config(cell.config, f"{cell.method}/seed{cell.seed}").rollout
    column = cell.schedule["objectives"].index("prompt")
    weights = list(enumerate(row[column] for row in cell.schedule["weights"]))
    steps = noisy_steps(rollout)
    return tuple(weights[steps.start : steps.stop] if steps else weights)


def conflicts(results: Results) -> Figure | None:
    """Shares of conflicted, both-positive and both-negative samples in the course of training."""
    cells = {m: [c.shares for c in results.of(m).values() if c.shares] for m in _styles(results)}
    cells = {  # a single rollout is no curve
        m: rows for m, rows in cells.items() if any(len(row["update"]) > 1 for row in rows)
    }
    if not cells:
        return None
    figure, panels = _subplots(1, 3, (6, 3.2))
    for axes, name in zip(panels, ("conflicted", "both_positive", "both_negative"), strict=True):
        for method, style in _styles(results).items():
            curves = [_smooth(c[f"share/{name}"]) for c in cells.get(method, [])]
            if curves:
                mean = _means(curves)
                plain = {key: style[key] for key in ("color", "label")}
                axes.plot(cells[method][0]["update"][: len(mean)], mean, lw=1.2, **plain)
        axes.set_title(name.replace("_", " "))
        axes.set_xlabel("update")
    _legend_below(figure, panels[0])
    return figure


def _subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _styles(results: Results) -> dict[str, dict]:
    """Method -> colour, marker, label; the same in every figure."""
    others = [m for m in results.labels if m != results.main]
    styles = {m: (_PALETTE[i % len(_PALETTE)], _MARKERS[(i + i // len(_PALETTE)) % len(_MARKERS)])
              for i, m in enumerate(others)}  # fmt: skip
    styles[results.main] = ("black", "o")
    return {
        m: {"color": styles[m][0], "marker": styles[m][1], "label": results.labels[m]}
        for m in results.methods
    }


def _bar(interval: Estimate) -> list[list[float]] | None:
    """How far the interval reaches below and above the mean."""
    if interval.low is None or interval.high is None:
        return None
    return [[interval.mean - interval.low], [interval.high - interval.mean]]


def _band(
    axes: Axes,
    x: Sequence[float],
    curves: Sequence[Sequence[float]],
    style: dict,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    *,
    filled: bool,
) -> list[float]:
    """Draws the mean of one curve a seed, with its interval if ``filled``; returns the mean.

    A run that has ended early ends the mean of all.
    """
    means = (over_seeds(values) for values in zip(*curves, strict=False))
    intervals = [mean.within(*bounds).as_drawn() for mean in means]
    middle, x = [i.mean for i in intervals], x[: len(intervals)]
    axes.plot(x, middle, ms=3, lw=1.4, **style)
    known = [(i.low, i.high) for i in intervals if i.low is not None and i.high is not None]
    if known and filled:
        low, high = zip(*known, strict=True)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.10, lw=0)
    return middle


def _means(curves: Sequence[Sequence[float]]) -> list[float]:
    """Of one curve a seed, as far as the shortest."""
    return [statistics.mean(values) for values in zip(*curves, strict=False)]


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Running mean: a rollout has a hundred samples only."""
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))
    ]


def _legend_below(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """The legend, in as many columns as fit the figure's width: a wider one would shrink it all."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = min(columns, len(handles), max(1, 100 // (max(map(len, labels)) + 6)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)
