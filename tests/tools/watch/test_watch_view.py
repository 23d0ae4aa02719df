"""How a terminal shows a run, wide and narrow."""

from __future__ import annotations

import dataclasses
import io

import pytest
from logs import add, begin
from rich.console import Console
from rich.padding import Padding

from customized_grpo.config import RunConfig
from customized_grpo.runs.log import RunLog
from customized_grpo.runs.progress import duration
from customized_grpo.tools.watch.facts import Facts, RewardCurve, ValidationScore, Watcher
from customized_grpo.tools.watch.view import Sparkline, frame


def shown(facts: Facts, width: int, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, record=True, width=width)
    console.print(frame(facts, width))
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.fixture
def log(tiny_config: RunConfig) -> RunLog:
    log = begin(tiny_config, num_updates=20)
    log.row(0, {"validation/clip-text": 0.25, "validation/dinov2": 0.5})
    for update in range(1, 8):
        add(log, update, copy_gap=update / 8)
    log._seconds = {"update": 1.0}
    log.row(8, {"loss": 0.5, "kl": 0.001, "validation/clip-text": 0.375, "validation/dinov2": 0.25})
    (log.folder / "checkpoints" / "000008").mkdir(parents=True)
    return log


def test_everything_is_there_on_80_columns(log: RunLog) -> None:
    facts = Watcher(log.folder).look()
    lines = shown(facts, 80)
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for part in (
        "running last line 0 s ago",
        "8 / 20 updates",
        "36 s left",
        "3 s/update",
        "1 images/s",
        "update 33%",
        "rollout 67%",
        "identity dinov2 0.070 0.040 ▁▃▆█",
        "prompt preference 0.070 0.040 ▁▃▆█",
        "identity copy gap 0.875 0.500",
        "synergy 50% identity only 12% prompt only 25% both bad 12%",
        "KL 0.001",
        "clipped 25.0%",
        "gradient norm 2",
        "update 8 clip-text 0.375 (+0.125) dinov2 0.250 (-0.250)",
        "checkpoint update 8 0 s ago",
    ):
        assert part in text, part


def test_the_same_is_there_on_40_columns(log: RunLog) -> None:
    facts = Watcher(log.folder).look()
    narrow = shown(facts, 40)
    assert max(map(len, narrow)) <= 40
    words = {word for line in narrow for word in line.split()}
    wide = {word for line in shown(facts, 80)[2:] for word in line.split() if "━" not in word}
    assert wide <= words


def test_what_judges_cost_is_said(log: RunLog) -> None:
    add(log, 9, **{"reward/judge/requests": 1920.0, "reward/judge/cost": 1.234})
    facts = Watcher(log.folder).look()
    assert facts.judges == {"judge": {"requests": 1920.0, "cost": 1.234}}
    assert "judges judge 1,920 requests, cost 1.23" in " ".join(" ".join(shown(facts, 80)).split())


@pytest.mark.parametrize("width", [40, 80])
def test_whether_it_works_is_said(log: RunLog, width: int) -> None:
    gains = {"identity": (0.25, 1.0), "prompt": (0.001, 0.0)}
    row = {f"gain/{name}": gain for name, (gain, _) in gains.items()}
    row |= {f"gain/{name}/error": 0.01 for name in gains}
    row |= {f"gain/{name}/sign": sign for name, (_, sign) in gains.items()}
    log.row(9, {"loss": 0.5, "validation/clip-text": 0.375, **row})
    text = " ".join(" ".join(shown(Watcher(log.folder).look(), width)).split())
    assert "works? half of it works: by the validation of update 9, identity is better" in text
    assert "give prompt more weight (advantage.schedule)." in text


@pytest.mark.parametrize("width", [40, 80])
def test_a_stalled_run_says_so_and_what_to_do(width: int) -> None:
    facts = Facts(run="runs/x", state="stalled", update=3, num_updates=8, silent=750, patience=61)
    lines = shown(facts, width)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert "stalled no line for 12 min, 61 s are much for an update here" in text
    assert "`cgrpo resume runs/x` goes on" in text


def test_states_are_named() -> None:
    for facts, text in (
        (Facts(run="r", state="waiting"), "r waiting has not begun: no config.yaml there yet"),
        (Facts(run="r", state="starting", silent=40), "r starting no update yet, begun 40 s ago"),
        (Facts(run="r", state="finished", update=8), "r finished after update 8"),
        (
            Facts(run="r", state="running", waits_for="waiting for votes"),
            "r running waiting for votes",
        ),
    ):
        assert " ".join(" ".join(shown(facts, 80)).split()) == text


def test_warnings_come_first_where_a_small_terminal_does_not_cut_them_off(log: RunLog) -> None:
    warnings = ["one [b]thing[/b]", "another"]
    facts = dataclasses.replace(Watcher(log.folder).look(), warnings=warnings)
    lines = shown(facts, 200)
    assert lines[1:3] == ["warning: one [b]thing[/b]", "warning: another"]
    assert "8 / 20 updates" in lines[4]


def test_names_may_have_brackets(log: RunLog) -> None:
    """They are no markup: it would end the run's watcher, or hide a part of a name."""
    names = ["clip[v2]", "a[/b]", ":dog:"]
    rewards = [RewardCurve(name=n, objective="o", last=0, recent=0, trend=[0]) for n in names]
    facts = dataclasses.replace(
        Watcher(log.folder).look(),
        rewards=rewards,
        stages={"[x]": 1.0},
        validation={n: ValidationScore(last=0.5, base=None) for n in names},
    )
    text = "\n".join(shown(facts, 80))
    assert all(text.count(name) == 2 for name in names)
    assert "[x] 100%" in text


def test_a_terminal_without_unicode_gets_ascii(log: RunLog) -> None:
    lines = shown(Watcher(log.folder).look(), 80, encoding="latin-1")
    assert "\n".join(lines).isascii()
    assert any(" .*#" in line or ":" in line for line in lines)


def test_a_curve_is_as_wide_as_there_is_room() -> None:
    console = Console(file=io.StringIO(), record=True, width=5)
    for values in ([float(i) for i in range(100)], [1.0, 1.0]):
        console.print(Padding(Sparkline(values), 0))
    assert console.export_text().split() == ["▁▃▅▆█", "▅▅"]


def test_durations() -> None:
    texts = [duration(s) for s in (0.4, 89, 90, 5399, 5400, 172_799, 172_800)]
    assert texts == ["0 s", "89 s", "2 min", "90 min", "1.5 h", "48.0 h", "2.0 days"]
