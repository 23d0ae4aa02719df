"""The facts about a run as a terminal shows them, on 40 columns and more."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from customized_grpo.runs.progress import duration
from customized_grpo.tools.watch.facts import Facts, binned

_QUADRANTS = {
    "share/both_positive": "synergy",
    "share/identity_only": "identity only",
    "share/prompt_only": "prompt only",
    "share/both_negative": "both bad",
}
_POLICY = {
    "loss": "loss",
    "kl": "KL",
    "clip_fraction": "clipped",
    "grad_norm": "gradient norm",
    "mismatch": "mismatch",
}
_STYLES = {"running": "green", "finished": "green", "stalled": "bold red", "stopped": "bold red"}


class Sparkline:
    """A curve of one line: the lowest value is an empty-looking block, the highest a full one."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = values

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        blocks = " .:-=+*#" if options.ascii_only else "▁▂▃▄▅▆▇█"
        values = binned(self._values, options.max_width)
        low, span = min(values), max(values) - min(values)
        heights = [(value - low) / span if span else 0.5 for value in values]
        yield Segment("".join(blocks[round(h * (len(blocks) - 1))] for h in heights))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(4, min(len(self._values), options.max_width))


def frame(facts: Facts, width: int) -> RenderableType:
    """One picture of a run, for a terminal of so many columns."""
    parts: list[RenderableType] = [_heading(facts)]
    parts += [Text(f"warning: {text}", style="yellow") for text in facts.warnings]
    if facts.num_updates:
        parts += [
            Padding(ProgressBar(total=facts.num_updates, completed=facts.update), 0),
            _items(_progress(facts)),
        ]
    if facts.rewards:
        parts += ["", _rewards(facts, width)]
    rows = {
        "time": [f"{name} {share:.0%}" for name, share in facts.stages.items()],
        "samples": [f"{_QUADRANTS[n]} {share:.0%}" for n, share in facts.shares.items()],
        "policy": [
            f"{_POLICY[n]} {v:{'.1%' if n == 'clip_fraction' else '.3g'}}"
            for n, v in facts.policy.items()
        ],
        "judges": _judges(facts),
        "validation": _validation(facts),
        "works?": [facts.works] if facts.works else [],
        "checkpoint": _checkpoint(facts),
    }
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(ratio=1)
    for name, texts in rows.items():
        if texts:
            grid.add_row(name, _items(texts))
    parts += ["", grid] if grid.row_count else []
    return Group(*parts)


def _heading(facts: Facts) -> Text:
    silent, patience = duration(facts.silent), duration(facts.patience)
    what = {
        "waiting": "has not begun: no config.yaml there yet",
        "starting": facts.waits_for or f"no update yet, begun {silent} ago",
        "running": facts.waits_for or f"last line {silent} ago",
        "stopped": facts.why,
        "finished": f"after update {facts.update}",
        "stalled": f"no line for {silent}, {patience} are much for an update here. It has died, "
        "hangs or waits for a reward; "
        f"`cgrpo resume {shlex.quote(facts.run)}` goes on with a dead one",
    }[facts.state]
    return Text.assemble(
        (facts.run, "bold"), "  ", (facts.state, _STYLES.get(facts.state, "yellow")), "  ", what
    )


def _progress(facts: Facts) -> list[str]:
    texts = [f"{facts.update} / {facts.num_updates} updates"]
    if facts.seconds_left and facts.state in ("running", "stalled"):
        texts.append(f"{duration(facts.seconds_left)} left")
    if facts.seconds_per_update and facts.images_per_second:
        texts += [f"{facts.seconds_per_update:.3g} s/update"]
        texts += [f"{facts.images_per_second:.3g} images/s"]
    return texts


def _rewards(facts: Facts, width: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("reward", overflow="fold")
    table.add_column("last", justify="right", no_wrap=True)
    table.add_column("last 10", justify="right", no_wrap=True)
    table.add_column("", width=max(8, min(32, width - 44)), no_wrap=True)
    for reward in (*facts.rewards, facts.copying):
        if reward is None:
            continue
        name = " ".join(dict.fromkeys((reward.objective, reward.name)))
        numbers = f"{reward.last:.3f}", f"{reward.recent:.3f}"
        table.add_row(Text(name), *numbers, Sparkline(reward.trend))
    return table


def _validation(facts: Facts) -> list[str]:
    if facts.validated is None:
        return []
    texts = [f"update {facts.validated}"]
    for name, score in facts.validation.items():
        change = "" if score.base is None else f" ({score.last - score.base:+.3f})"
        texts.append(f"{name} {score.last:.3f}{change}")
    return texts


def _judges(facts: Facts) -> list[str]:
    texts = []
    for name, spent in facts.judges.items():
        cost = f", cost {spent['cost']:,.2f}" if "cost" in spent else ""
        texts.append(f"{name} {spent['requests']:,.0f} requests{cost}")
    return texts


def _checkpoint(facts: Facts) -> list[str]:
    if facts.checkpoint is None:
        return []
    age = [] if facts.checkpoint_age is None else [f"{duration(facts.checkpoint_age)} ago"]
    return [f"update {facts.checkpoint}", *age]


def _items(texts: Sequence[str]) -> Columns:
    return Columns([Text(text) for text in texts], padding=(0, 2))  # names may have brackets
