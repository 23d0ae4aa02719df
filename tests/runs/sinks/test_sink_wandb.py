"""What wandb keeps of a run, offline, read from its own records."""

from __future__ import annotations

import itertools
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sink_logs import add, live_and_die, number, open_log, points

from customized_grpo.config import RunConfig
from customized_grpo.errors import ConfigError
from customized_grpo.runs.log import RunLog
from customized_grpo.runs.sinks.wandb import WandbConfig

pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")

SECRET = "s3cret" * 7
_BLOCK, _HEAD = 32768, 7


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)


def offline_runs(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("offline-run-*/*.wandb"))


def records(file: Path, kind: str) -> list[Any]:
    return [getattr(r, kind) for r in _records(file) if r.WhichOneof("record_type") == kind]


def kinds(file: Path) -> set[str]:
    return {record.WhichOneof("record_type") for record in _records(file)}


def _records(file: Path) -> Iterator[Any]:
    for chunk in _chunks(file.read_bytes()):
        record = pb.Record()
        record.ParseFromString(chunk)
        yield record


def _chunks(data: bytes) -> Iterator[bytes]:
    """Of a log in LevelDB's format, behind wandb's header."""
    assert data[:4] == b":W&B"
    place, whole = _HEAD, b""
    while place + _HEAD <= len(data):
        if _BLOCK - place % _BLOCK < _HEAD:
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + _HEAD : place + _HEAD + length]
        place += _HEAD + length
        if kind in (1, 4):  # all of it, or its last part
            yield whole
            whole = b""


def history(file: Path) -> dict[str, dict[int, Any]]:
    """Name -> step -> value; wandb's own names and those of pictures have other shapes."""
    found: dict[str, dict[int, Any]] = {}
    for record in records(file, "history"):
        for item in record.item:
            if len(item.nested_key) == 1 and not item.nested_key[0].startswith("_"):
                steps = found.setdefault(item.nested_key[0], {})
                assert record.step.num not in steps
                steps[record.step.num] = number(json.loads(item.value_json))
    return found


@pytest.fixture
def log(tiny_config: RunConfig) -> RunLog:
    return open_log(tiny_config, WandbConfig(project="dogs", tags=("a", "b")))


def test_numbers_pictures_and_config(log: RunLog, capfd: pytest.CaptureFixture) -> None:
    with log.feeding():
        for update in range(4):
            add(log, update)
    (file,) = offline_runs(log.folder)
    assert history(file) == points(log.folder)
    pictures = sorted((file.parent / "files" / "media" / "images").iterdir())
    assert [p.name.split("_")[1] for p in pictures] == ["0", "2"]
    assert pictures[1].read_bytes() == (log.folder / "samples" / "000002.png").read_bytes()
    run = records(file, "run")[0]
    assert (run.project, run.display_name, list(run.tags)) == ("dogs", "emoji", ["a", "b"])
    assert run.run_id == json.loads((log.folder / "sinks" / "wandb.json").read_text())["id"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update if item.key}
    assert config["rollout"]["group_size"] == 3
    assert not run.git.remote_url
    assert [record.exit_code for record in records(file, "exit")] == [0]
    shown = capfd.readouterr()
    written = [p.read_bytes() for p in log.folder.rglob("*") if p.is_file()]
    assert SECRET not in shown.out + shown.err
    assert not any(SECRET.encode() in content for content in written)


def test_nothing_else_is_collected(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTNAME", "my-machine")
    monkeypatch.setattr("socket.gethostname", lambda: "my-machine")
    with log.feeding():
        add(log, 1)
        time.sleep(2.0)  # load is recorded from the beginning on
    (file,) = offline_runs(log.folder)
    assert kinds(file) == {"header", "run", "telemetry", "history", "summary", "exit"}
    (run,) = records(file, "run")
    assert run.host == "-"
    assert b"my-machine" not in file.read_bytes()
    assert not run.HasField("git")
    assert [item.key for item in run.config.update if item.key.startswith("_")] == ["_wandb"]
    for telemetry in [run.telemetry, *records(file, "telemetry")]:
        assert {field.name for field, _ in telemetry.ListFields()} <= {
            "imports_init", "imports_finish", "feature", "python_version", "cli_version",
            "huggingface_version", "platform",
        }  # fmt: skip
        assert "-" in telemetry.platform
    assert not (file.parent / "files" / "wandb-metadata.json").exists()


def test_another_project_or_mode_is_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [WandbConfig().place(), WandbConfig(project="cats").place()]
    places.append(WandbConfig(entity="us").place())
    assert WandbConfig(tags=("a",)).place() == places[0]
    monkeypatch.setenv("WANDB_MODE", "online")
    places.append(WandbConfig().place())
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    places.append(WandbConfig().place())
    assert len(set(places)) == 5


def test_offline_every_life_writes_the_whole_run(
    log: RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb names a life's folder by the second it begins in."""
    clock = SimpleNamespace(time=itertools.count(1_700_000_000).__next__)
    monkeypatch.setattr("wandb.sdk.wandb_init.time", clock)
    live_and_die(log)
    first, second = offline_runs(log.folder)
    assert list(history(first)["loss"]) == [1, 2, 3, 4]
    assert history(second) == points(log.folder)
    ids = [records(file, "run")[0].run_id for file in (first, second)]
    assert ids[0] == ids[1]


def test_a_key_is_needed_online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = WandbConfig()
    for mode in ("offline", "dryrun", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        config.check()
    for mode in ("online", ""):
        monkeypatch.setenv("WANDB_MODE", mode)
        with pytest.raises(ConfigError, match="WANDB_API_KEY, got nothing; export it, run"):
            config.check()
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    (tmp_path / "netrc").chmod(0o600)
    config.check()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        config.check()
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    config.check()
