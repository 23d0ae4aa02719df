"""What is known of a run from its folder: speed, states, and logs that change while one looks."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import changed
from logs import add, begin, cut_off

from customized_grpo.config import RunConfig
from customized_grpo.errors import CheckpointError
from customized_grpo.runs.files import MetricsReader
from customized_grpo.runs.log import RunLog
from customized_grpo.tools.watch import facts
from customized_grpo.tools.watch.facts import ValidationScore, Watcher, binned

NOW = float(int(time.time()))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The watcher's clock stands still."""
    clock = SimpleNamespace(time=lambda: NOW)
    monkeypatch.setattr(facts, "time", clock)
    return clock


def age(folder: Path, seconds: float) -> None:
    """Gives the folder's log and config an age."""
    for name in ("metrics.jsonl", "config.yaml"):
        if (folder / name).exists():
            os.utime(folder / name, (NOW - seconds,) * 2)


def test_speed_is_that_of_the_last_rollouts_without_the_first(tiny_config: RunConfig) -> None:
    log = begin(tiny_config, num_updates=40)
    log._seconds = {"validation": 3.0}
    log.row(0, {"validation/clip-text": 0.25, "validation/reward/clip-text": 0.5})
    log._seconds = {"update": 500.0}
    add(log, 1)
    for update in range(2, 8):
        add(log, update)
    log._seconds = {"update": 1.0, "validation": 6.0}
    log.row(8, {"validation/clip-text": 0.5, "validation/new": 0.75})
    seen = Watcher(log.folder).look()
    # After the first rollout: 6 updates of 1 s, 3 rollouts of 4 s, one validation of 6 s.
    assert seen.seconds_per_update == pytest.approx(4.0)
    assert seen.seconds_left == pytest.approx(4.0 * 32)
    assert seen.images_per_second == pytest.approx(6 / 2 / 4.0)
    assert seen.stages == pytest.approx({"update": 0.25, "rollout": 0.5, "validation": 0.25})
    assert (seen.state, seen.update, seen.num_updates) == ("running", 8, 40)
    assert seen.validated == 8
    assert seen.validation["clip-text"] == ValidationScore(last=0.5, base=0.25)
    assert seen.validation["new"] == ValidationScore(last=0.75, base=None)


def test_speed_is_of_whole_rollouts(tiny_config: RunConfig) -> None:
    """120 s of sampling, then four updates of 10 s: 40 s each, whenever one looks."""
    config = changed(tiny_config, train={"num_updates": 40, "inner_updates": 4})
    config = changed(config, rollout={"prompts_per_rollout": 4, "group_size": 3})
    log = RunLog(Path(config.output_dir, config.name), config, torch.device("cpu"))
    watcher = Watcher(log.folder)
    for update in range(1, 15):
        log._seconds = {"update": 10.0} | ({"rollout": 120.0} if update % 4 == 1 else {})
        log.row(update, {})
        seen = watcher.look()
        if update < 4:
            assert (seen.seconds_per_update, seen.seconds_left, seen.stages) == (None, None, {})
        else:
            assert seen.seconds_per_update == pytest.approx(40.0)
            assert seen.seconds_left == pytest.approx(40.0 * (40 - update))
            assert seen.images_per_second == pytest.approx(12 / 160)
            assert seen.stages == pytest.approx({"update": 0.25, "rollout": 0.75})


def test_rewards_shares_and_policy(tiny_config: RunConfig) -> None:
    log = begin(tiny_config, num_updates=60)
    for update in range(1, 41):
        add(log, update)
    seen = Watcher(log.folder).look()
    assert [(r.objective, r.name) for r in seen.rewards] == [
        ("identity", "dinov2"),
        ("prompt", "preference"),
    ]
    assert seen.rewards[0].last == 0.39
    assert seen.rewards[0].recent == pytest.approx(sum(range(21, 41, 2)) / 10 / 100)
    assert seen.rewards[0].trend == pytest.approx([u / 100 for u in range(1, 41, 2)])
    assert seen.shares["share/both_positive"] == 0.5
    assert seen.shares["share/identity_only"] == 0.125
    assert seen.policy == {"loss": 0.5, "clip_fraction": 0.25, "grad_norm": 2.0}
    assert seen.warnings == []


def test_rewards_by_an_import_path_are_called_as_in_the_log(tiny_config: RunConfig) -> None:
    log = begin(tiny_config)
    (log.folder / "config.yaml").write_text(
        (log.folder / "config.yaml").read_text().replace("type: dinov2", "type: mine:RewardConfig")
    )
    add(log, 1, **{"reward/other/mean": 0.5})  # one that the config does not know
    add(log, 2)
    assert [(r.objective, r.name) for r in Watcher(log.folder).look().rewards] == [
        ("", "other"),
        ("identity", "dinov2"),
        ("prompt", "preference"),
    ]


def test_copying_is_a_curve_of_its_own(tiny_config: RunConfig) -> None:
    log = begin(tiny_config)
    assert Watcher(log.folder).look().copying is None
    for update, gap in ((1, 0.125), (3, 0.5)):
        add(log, update, copy_gap=gap)
    copying = Watcher(log.folder).look().copying
    assert copying is not None
    assert (copying.last, copying.recent, copying.trend) == (0.5, 0.3125, [0.125, 0.5])


def test_a_line_counts_when_it_is_whole(tiny_config: RunConfig) -> None:
    log = begin(tiny_config)
    add(log, 1)
    cut_off(log)
    watcher = Watcher(log.folder)
    assert watcher.look().update == 1
    with (log.folder / "metrics.jsonl").open("a") as file:
        file.write('5, "grad_norm": 7.0}\n')
    assert watcher.look().update == 99
    assert watcher.look().policy["grad_norm"] == pytest.approx((2 + 7) / 2)


def test_a_resumed_run_is_read_again(tiny_config: RunConfig) -> None:
    log = begin(tiny_config)
    watcher = Watcher(log.folder)
    for update in range(1, 7):
        add(log, update)
    cut_off(log)
    assert watcher.look().update == 6
    log.rewind(update=2, rollouts=1)
    assert watcher.look().update == 2
    add(log, 3, grad_norm=9.0)
    seen = watcher.look()
    assert (seen.update, seen.policy["grad_norm"]) == (3, (2.0 + 9.0) / 2)


def test_updates_that_are_there_twice_count_once(tiny_config: RunConfig) -> None:
    log = begin(tiny_config)
    for update in (1, 2, 3, 4, 3):
        add(log, update)
    reader = MetricsReader(log.folder)
    assert reader.read()
    assert [row["update"] for row in reader.rows] == [1, 2, 3]
    assert not reader.read()


def test_lines_that_are_no_rows_are_passed_over(tmp_path: Path) -> None:
    lines = ['{"update": 1}', '{"upd{"update": 2}', "[]", "7", '{"loss": 1}', '{"update": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    reader = MetricsReader(tmp_path)
    reader.read()
    assert [row["update"] for row in reader.rows] == [1, 3]


def test_states_from_the_beginning_to_the_end(tiny_config: RunConfig) -> None:
    folder = Path(tiny_config.output_dir, tiny_config.name)
    watcher = Watcher(folder)
    assert watcher.look().state == "waiting"
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    assert watcher.look().state == "waiting"
    log = begin(tiny_config)
    assert watcher.look().state == "starting"
    log.row(0, {"validation/clip-text": 0.25})
    assert watcher.look().state == "starting"
    add(log, 1)
    assert watcher.look().state == "running"
    log.finish(8)
    assert watcher.look().state == "finished"
    log.stop("out of memory; `cgrpo resume runs/x` goes on")
    assert watcher.look().state == "finished"
    log = begin(tiny_config, num_updates=10)  # made longer; its checkpoint is being read
    assert watcher.look().state == "running"
    log.rewind(update=1, rollouts=1)
    assert watcher.look().state == "running"


def test_a_run_is_stalled_when_it_is_silent_for_much_longer_than_an_update_takes(
    tiny_config: RunConfig,
) -> None:
    log = begin(tiny_config)
    for update in (1, 2, 3):
        add(log, update)
    for seconds, state in ((59, "running"), (61, "stalled")):
        age(log.folder, seconds)
        assert Watcher(log.folder).look().state == state
    log._seconds = {"checkpoint": 100.0}
    add(log, 4)  # the longest update takes 101 s
    for seconds, state in ((4 * 101 - 1, "running"), (4 * 101 + 1, "stalled")):
        age(log.folder, seconds)
        seen = Watcher(log.folder).look()
        assert seen.state == state
        assert seen.silent == seconds
        assert seen.patience == 4 * 101


def test_what_the_metrics_warn_of(tiny_config: RunConfig) -> None:
    log = begin(tiny_config)
    for update in (1, 2, 3):
        add(log, update, clip_fraction=0.75)
    add(log, 3, zero_variance_groups=2.0, invalid_samples=1.0, clip_fraction=0.75)
    add(log, 4, skipped_updates=1.0, grad_norm=math.nan, micro_batch_size=8.0, clip_fraction=0.75)
    (log.folder / "failures" / "000004").mkdir(parents=True)
    seen = Watcher(log.folder).look()
    assert "grad_norm" in seen.policy  # of the update before
    assert seen.warnings == [
        "1 of the last 4 updates skipped, without finite gradient; "
        f"`cgrpo replay {log.folder}/failures/000004` shows it again",
        "1 of the last rollout's 6 images not scored",
        "2 of the last rollout's 2 groups have equal scores: nothing to learn from",
        "75% of the gradient is clipped away: lower train.learning_rate or train.inner_updates",
        "out of memory: micro-batches halved to 8 pairs",
    ]


def test_an_alarm_for_hacking_is_a_warning(tiny_config: RunConfig) -> None:
    log = begin(tiny_config)
    for update, count, score in ((0, 0, 0.5), (2, 0, 0.75), (4, 1, 0.7), (6, 2, 0.65)):
        add(log, update, **{"hacking/dinov2": count, "validation/dinov2": score})
    assert Watcher(log.folder).look().warnings == []  # faults.hacking_patience is 3
    add(log, 7)
    calm = {"hacking/clip-text": 0.0, "copying/clip-text": 0.0, "validation/clip-text": 0.25}
    add(log, 8, **{"hacking/dinov2": 3.0, "validation/dinov2": 0.625} | calm)
    assert Watcher(log.folder).look().warnings == [
        "reward hacking: dinov2 is 0.1250 below its best while a reward of its objective has "
        "risen, 3 validations in a row"
    ]
    add(log, 10, **calm | {"copying/clip-text": 4.0, "validation/clip-text": 0.125})
    assert Watcher(log.folder).look().warnings == [
        "copying: clip-text is 0.1250 below its best while the copy gap has risen, 4 validations "
        "in a row"
    ]


def test_the_newest_checkpoint_is_named(tiny_config: RunConfig) -> None:
    log = begin(tiny_config)
    assert Watcher(log.folder).look().checkpoint is None
    for name in ("000002", "000004", "000006.weights", "000006.tmp"):
        (log.folder / "checkpoints" / name).mkdir(parents=True)
    os.utime(log.folder / "checkpoints" / "000004", (NOW - 100,) * 2)
    seen = Watcher(log.folder).look()
    assert seen.checkpoint == 4
    assert seen.checkpoint_age == 100


def test_plugs_of_the_run_need_not_be_installed(tiny_config: RunConfig) -> None:
    log = begin(tiny_config)
    config = log.folder / "config.yaml"
    config.write_text(config.read_text().replace("type: dinov2", "type: elsewhere:Reward"))
    add(log, 1, **{"reward/elsewhere:Reward/mean": 0.5})
    assert {r.name: r.last for r in Watcher(log.folder).look().rewards}["elsewhere:Reward"] == 0.5


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"must be the folder of a run, got the file .*file"):
        Watcher(tmp_path / "file").look()
    (tmp_path / "config.yaml").write_text("rollout: {}")
    with pytest.raises(CheckpointError, match=r"environment\.json is not in it; begin: "):
        Watcher(tmp_path).look()


def test_a_curve_is_thinned_to_means() -> None:
    assert binned([], 4) == []
    assert binned([1.0, 2.0], 4) == [1.0, 2.0]
    assert binned([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    means = binned([float(i) for i in range(1000)], 64)
    assert len(means) == 64
    assert means == sorted(means)


def test_a_long_log_is_read_once(tmp_path: Path) -> None:
    reader = MetricsReader(tmp_path)
    file = tmp_path / "metrics.jsonl"
    with file.open("w") as opened:
        for update in range(1, 1001):
            opened.write(json.dumps({"update": update}) + "\n")
    reader.read()
    file.write_bytes(b"#" * file.stat().st_size)  # in place: a second look would see it
    with file.open("a") as opened:
        opened.write('{"update": 1001}\n')
    reader.read()
    assert [row["update"] for row in reader.rows] == list(range(1, 1002))
