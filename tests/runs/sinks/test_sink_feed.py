"""What a sink gets, and that whatever it does, training does not notice."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import changed, metrics, wait_until
from recorders import FailingConfig, Hanging, HangingConfig, RecorderConfig
from runs.test_distributed import finished, torchrun
from safetensors.torch import load_file
from sink_logs import FedLog, open_log, picture, with_sinks

from customized_grpo.config import RunConfig, dump_config, load_config
from customized_grpo.config.decoding import to_raw
from customized_grpo.errors import ConfigError
from customized_grpo.runs.log import RunLog, SilentLog
from customized_grpo.runs.resume import check_changes
from customized_grpo.runs.sinks import base, feed
from customized_grpo.runs.sinks.feed import describe_run
from customized_grpo.training.train import train


@pytest.fixture
def got(tmp_path: Path) -> Path:
    """The file of a recorder."""
    return tmp_path / "got.jsonl"


@pytest.fixture
def log(tiny_config: RunConfig, got: Path) -> FedLog:
    return open_log(tiny_config, RecorderConfig(file=str(got)))


def lines(got: Path, *what: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in got.read_text().splitlines()]
    return [line for line in found if line["what"] in what]


def updates(got: Path, *what: str) -> list[int]:
    return [line["update"] for line in lines(got, *what)]


@pytest.mark.slow
def test_sinks_get_the_log_in_order_and_change_no_weight(
    tiny_config: RunConfig, got: Path, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    monkeypatch.setenv("SINK_TOKEN", "s3cret-t0ken")
    config = changed(tiny_config, evaluation={"validate_every": 2, "num_validation": 2})
    plain = train(dataclasses.replace(config, name="plain"))
    assert not any(message.startswith("sink ") for message in caplog.messages)
    config = with_sinks(config, RecorderConfig(file=str(got)), FailingConfig())
    run = train(config)

    weights = [load_file(r / "weights" / "pytorch_lora_weights.safetensors") for r in (plain, run)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [message for message in caplog.messages if message.startswith("sink ")] == [
        "sink failing: ConnectionError: no route to ***; the run goes on"
    ]

    rows = metrics(run)
    assert [{"update": g["update"], **g["values"]} for g in lines(got, "metrics")] == rows
    assert updates(got, "picture") == [0, 2]
    sizes = [(run / "samples" / f"{u:06d}.png").stat().st_size for u in (0, 2)]
    assert [line["bytes"] for line in lines(got, "picture")] == sizes
    opened, closed = lines(got, "open", "close")
    assert (opened["name"], opened["update"], closed["failed"]) == (config.name, 0, False)
    assert opened["config"]["rollout"]["group_size"] == 3
    assert load_config(run / "config.yaml") == config


@pytest.fixture
def _hang() -> Iterator[None]:
    """Hanging sinks hang until the end of the test."""
    Hanging.released.clear()
    yield
    Hanging.released.set()


@pytest.mark.usefixtures("_hang")
def test_a_hanging_sink_stops_and_slows_nothing(tiny_config, got, caplog, monkeypatch) -> None:
    monkeypatch.setattr(feed, "_LAST_WORDS", 0.1)
    log = open_log(tiny_config, HangingConfig(), RecorderConfig(file=str(got)))
    with log.feeding():
        for update in range(1, 200):
            log.row(update, {"loss": 1.0})
    assert not Hanging.released.is_set()
    assert updates(got, "metrics") == list(range(1, 200))  # the other one gets everything
    assert caplog.messages == ["sink hanging: not done 0.1 s after the end of the run, left alone"]


@pytest.mark.usefixtures("_hang")
def test_the_end_waits_for_all_sinks_together(tiny_config, monkeypatch, caplog) -> None:
    """Until one deadline, not for one sink after the other."""
    monkeypatch.setattr(feed, "_LAST_WORDS", 0.1)
    deadlines: list[float] = []
    wait = feed.Feed.wait
    monkeypatch.setattr(
        feed.Feed, "wait", lambda self, end: (deadlines.append(end), wait(self, end))[1]
    )
    sinks = [HangingConfig(type=f"hanging-{i}") for i in range(4)]  # pyright: ignore
    log = open_log(tiny_config, *sinks)
    with log.feeding():
        log.row(1, {"loss": 1.0})
    assert deadlines == deadlines[:1] * 4
    assert len(caplog.messages) == 4


def test_a_sink_that_could_not_be_opened_gets_everything_later(
    tiny_config: RunConfig, got: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setattr(feed, "_PAUSE", 0.01)
    build, tries = RecorderConfig.build, iter(range(100))

    def late(self: RecorderConfig, run: base.RunInfo) -> object:
        if next(tries) < 3:
            raise OSError("down")
        return build(self, run)

    monkeypatch.setattr(RecorderConfig, "build", late)
    log = open_log(tiny_config, RecorderConfig(file=str(got)))
    with log.feeding():
        for update in (1, 2):
            log.row(update, {"loss": 1.0})
        wait_until(got.exists)
    assert updates(got, "metrics") == [1, 2]
    assert caplog.messages == ["sink recorder: OSError: down; the run goes on"]


def test_a_resumed_run_sends_nothing_twice_and_misses_nothing(log: FedLog, got: Path) -> None:
    with log.feeding():
        picture(log, 0)
        for update in (1, 2, 3, 4):
            log.row(update, {"loss": update / 2})
    log.rewind(update=2, rollouts=2)
    log.row(3, {"loss": 1.5})  # as when the sink was too late
    log.row(4, {"loss": 2.0})
    log.row(5, {"loss": 2.5})
    picture(log, 5)
    with log.feeding():
        log.row(6, {"loss": 3.0})
        picture(log, 6)
    assert updates(got, "metrics") == [1, 2, 3, 4, 5, 6]
    assert [line["values"]["loss"] for line in lines(got, "metrics")] == [
        u / 2 for u in range(1, 7)
    ]
    assert updates(got, "picture") == [0, 5, 6]
    first, second = lines(got, "open")
    assert (first["update"], second["update"]) == (0, 5)
    assert first["id"] == second["id"]


def test_a_row_whose_picture_came_first_is_not_lost(log: FedLog, got: Path) -> None:
    """As after kill -9 while the base is validated: no row, no checkpoint."""
    with log.feeding():
        picture(log, 0)
    log.rewind(update=-1, rollouts=0)
    with log.feeding():
        picture(log, 0)
        log.row(0, {"validation/clip-text": 0.5})
    assert updates(got, "metrics") == [0]
    assert updates(got, "picture") == [0]


def test_a_picture_whose_row_came_first_is_not_lost(log: FedLog, got: Path) -> None:
    """As after kill -9 between the two: the update is computed again."""
    with log.feeding():
        picture(log, 0)
        for update in (1, 2, 3):
            log.row(update, {"loss": 1.0})
    log.rewind(update=2, rollouts=0)
    with log.feeding():
        log.row(3, {"loss": 1.0})
        picture(log, 3)
    assert updates(got, "metrics") == [1, 2, 3]
    assert updates(got, "picture") == [0, 3]


def test_another_place_gets_the_whole_run(tiny_config: RunConfig, tmp_path: Path) -> None:
    """And the former one, when the run comes back to it, what was sent elsewhere meanwhile."""
    a, b = tmp_path / "a", tmp_path / "b"
    for number, file in enumerate((a, b, a)):
        log = open_log(tiny_config, RecorderConfig(file=str(file)))
        with log.feeding():
            log.row(number, {"loss": 1.0})
            picture(log, number)
    for kind in ("metrics", "picture"):
        assert updates(a, kind) == [0, 1, 2]
        assert updates(b, kind) == [0, 1]
    assert updates(a, "open") == [0, 1]
    assert len({line["id"] for file in (a, b) for line in lines(file, "open")}) == 1


def test_a_sink_that_starts_over_gets_everything_again(tiny_config, got: Path) -> None:
    log = open_log(tiny_config, RecorderConfig(file=str(got), again=True))
    with log.feeding():
        log.row(1, {"loss": 1.0})
    with log.feeding():
        log.row(2, {"loss": 1.0})
    assert updates(got, "open", "metrics") == [0, 1, 0, 1, 2]
    assert len({line["id"] for line in lines(got, "open")}) == 1


def test_a_sink_that_is_added_later_gets_the_whole_run(tiny_config, got: Path) -> None:
    log = open_log(tiny_config)
    with log.feeding():
        log.row(0, {"validation/clip-text": 0.5})
        picture(log, 0)
        log.row(1, {"loss": 1.0})
    assert not (log.folder / "sinks").exists()
    more = with_sinks(tiny_config, RecorderConfig(file=str(got)))
    check_changes(tiny_config, more, allow_changed=False)
    with open_log(more, *more.sinks).feeding():
        pass
    assert [(line["what"], line["update"]) for line in lines(got, "metrics", "picture")] == [
        ("metrics", 0), ("picture", 0), ("metrics", 1),
    ]  # fmt: skip


def test_a_run_that_was_stopped_is_closed_as_failed(log: FedLog, got: Path) -> None:
    def stopped() -> None:
        with log.feeding():
            log.row(1, {"loss": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [line["failed"] for line in lines(got, "close")] == [True]
    log.row(2, {"loss": 1.0})  # nobody is fed any more
    assert updates(got, "metrics") == [1]


def test_a_process_that_leaves_the_folder_to_another_one_logs_nothing(tmp_path: Path) -> None:
    public = {name for name in vars(RunLog) if not name.startswith("_")}
    assert public - vars(SilentLog).keys() == {"timed"}
    SilentLog(tmp_path).row(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_files_is_one_warning(log: FedLog, got: Path, caplog) -> None:
    (log.folder / "sinks").write_text("in the way")
    with log.feeding():
        log.row(1, {"loss": 1.0})
    assert len(caplog.messages) == 1
    assert "NotADirectoryError" in caplog.text or "FileExistsError" in caplog.text


@pytest.mark.parametrize("sent", [4, {"place": 4}, {"place": {"row": 4}}])
def test_a_damaged_note_is_one_warning(log: FedLog, got: Path, caplog, monkeypatch, sent) -> None:
    monkeypatch.setattr(feed, "sha256", lambda text: SimpleNamespace(hexdigest=lambda: "place"))
    note = log.folder / "sinks" / "recorder.json"
    note.parent.mkdir()
    note.write_text(json.dumps({"id": "x", "sent": sent}))
    with log.feeding():
        log.row(1, {"loss": 1.0})
    assert updates(got, "metrics") == [1]
    assert len(caplog.messages) == 1


def test_a_place_that_cannot_be_told_is_one_warning(log: FedLog, got: Path, caplog, monkeypatch):
    monkeypatch.setattr(RecorderConfig, "place", lambda self: 1 / 0)
    with log.feeding():
        log.row(1, {"loss": 1.0})
    assert updates(got, "metrics") == [1]
    assert caplog.messages == [
        "sink recorder: ZeroDivisionError: division by zero; the run goes on"
    ]


def test_secrets_in_a_stranger_s_config_stay_here(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_sinks(tiny_config, FailingConfig())
    raw = describe_run(config, tmp_path).config
    assert raw["sinks"] == [{"type": "recorders:FailingConfig", "api_key": "***"}]
    assert raw["rollout"]["group_size"] == 3
    assert {**raw, "sinks": []} == {**to_raw(tiny_config), "sinks": []}


def test_what_is_missing_is_named_before_anything_is_made(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, got: Path
) -> None:
    monkeypatch.setattr(RecorderConfig, "check", lambda self: base.need_package("no_such_package"))
    config = with_sinks(tiny_config, HangingConfig(), RecorderConfig(file=str(got)))
    wanted = r"^sinks\.1\.type: 'no_such_package' needs the extra packages .*\[no_such_package\]'$"
    with pytest.raises(ConfigError, match=wanted):
        train(config)
    assert not Path(config.output_dir, config.name).exists()


def test_a_folder_of_the_package_s_name_is_no_package(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "left_by_it").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="'left_by_it' needs the extra packages"):
        base.need_package("left_by_it")
    base.need_package("json")


def test_a_sink_is_named_once(tiny_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump_config(tiny_config))
    sink = {"type": "recorders:RecorderConfig", "file": "x"}
    flags = ["--sinks", json.dumps([sink])]
    assert load_config(tmp_path / "run.yaml", flags).sinks == (RecorderConfig(file="x"),)
    for value, match in (
        ([sink, sink], r"sinks\.1\.type must be unique, got 'recorder' twice"),
        ([sink | {"fiel": 1}], r"sinks\.0\.fiel must be a known field, got \"fiel\"; did you mean"),
        ([{"type": "tensorbord"}], r"sinks\.0\.type must be one of .*did you mean 'tensorboard'"),
    ):
        with pytest.raises(ConfigError, match=match):
            load_config(tmp_path / "run.yaml", ["--sinks", json.dumps(value)])


def in_two_processes(config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        patch.setenv("PYTHONPATH", path)
        return torchrun(config, folder)


@pytest.mark.long
@pytest.mark.slow
def test_of_two_processes_the_first_one_sends(
    tiny_config: RunConfig, tmp_path: Path, got: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_sinks(tiny_config, RecorderConfig(file=str(got)))
    finished(in_two_processes(config, tmp_path, monkeypatch))
    assert updates(got, "open", "metrics", "picture", "close") == [0, 0, 1, 2, 2, -1]
    assert len({line["pid"] for line in lines(got, "open", "metrics", "close")}) == 1


@pytest.mark.long
@pytest.mark.slow
def test_of_two_processes_that_stop_the_other_one_waits_for_the_sinks(
    tiny_config: RunConfig, tmp_path: Path, got: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher ends the first one as soon as the other has failed."""
    config = changed(tiny_config, train={"num_updates": 50})
    config = with_sinks(config, RecorderConfig(file=str(got), stops=True))
    process = in_two_processes(config, tmp_path, monkeypatch)
    process.communicate(timeout=250)
    assert process.returncode != 0
    assert [line["failed"] for line in lines(got, "close")] == [True]
