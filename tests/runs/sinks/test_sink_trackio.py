"""What trackio keeps of a run, read from its database."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from PIL import Image
from sink_logs import live_and_die, number, open_log, points

from customized_grpo.config import RunConfig, load_config
from customized_grpo.errors import ConfigError
from customized_grpo.runs.sinks.feed import describe_run
from customized_grpo.runs.sinks.trackio import TrackioConfig

pytest.importorskip("trackio")


def read(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(folder / "dogs.db")) as database:
        return database.execute(query).fetchall()


def test_a_resumed_run_has_every_number_and_picture_once(
    tiny_config: RunConfig, trackio_folder: Path
) -> None:
    log = open_log(tiny_config, TrackioConfig(project="dogs"))
    live_and_die(log)
    found: dict[str, dict[int, Any]] = {}
    for step, content in read(trackio_folder, "SELECT step, metrics FROM metrics"):
        for name, value in json.loads(content).items():
            assert step not in found.setdefault(name, {})
            found[name][step] = number(float(value)) if name != "samples" else value["file_path"]
    pictures = found.pop("samples")
    assert found == points(log.folder)
    assert list(pictures) == [0, 2, 4, 6]
    with Image.open(trackio_folder / "media" / pictures[6]) as shown:
        assert shown.convert("RGB").getpixel((0, 0)) == (6, 0, 255)
    assert len(read(trackio_folder, "SELECT DISTINCT run_id FROM metrics")) == 1
    ((name, config),) = read(trackio_folder, "SELECT run_name, config FROM configs")
    assert name.startswith("emoji-")
    assert json.loads(config)["rollout"]["group_size"] == 3


def test_runs_of_the_same_name_stay_apart(tiny_config: RunConfig, trackio_folder: Path) -> None:
    for place in ("a", "b"):
        log = open_log(
            dataclasses.replace(tiny_config, output_dir=str(trackio_folder.parent / place)),
            TrackioConfig(project="dogs"),
        )
        with log.feeding():
            log.row(1, {"loss": 1.0})
    assert len(read(trackio_folder, "SELECT DISTINCT run_id FROM metrics")) == 2


def test_a_space_needs_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    TrackioConfig().check()
    with pytest.raises(ConfigError, match=r"space: 'me/dogs' needs the environment variable HF_TO"):
        TrackioConfig(space="me/dogs").check()
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    TrackioConfig(space="me/dogs").check()


def test_a_space_that_is_made_is_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from trackio import deploy

    class Enough(BaseException):
        """trackio takes every Exception for a Space that is out of reach."""

    made = []
    monkeypatch.setattr(deploy, "raise_if_space_is_frozen_for_logging", lambda space: None)
    monkeypatch.setattr(deploy, "resolve_auto_bucket_id", lambda space, bucket: bucket)

    def make(*arguments: object) -> bool:
        made.append(arguments)
        raise Enough

    monkeypatch.setattr(deploy, "create_space_if_not_exists", make)
    run = describe_run(load_config(ROOT / "configs" / "emoji.yaml"), tmp_path)
    with pytest.raises(Enough):
        TrackioConfig(space="me/dogs").build(run)
    assert made == [("me/dogs", None, "me/dogs-bucket", True)]


def test_another_project_space_or_folder_is_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [TrackioConfig().place(), TrackioConfig(project="cats").place()]
    places.append(TrackioConfig(space="me/dogs").place())
    monkeypatch.setenv("TRACKIO_DIR", "elsewhere")
    places.append(TrackioConfig().place())
    assert TrackioConfig(space="me/dogs").place() == places[2]
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/cats")
    places.append(TrackioConfig().place())
    assert len(set(places)) == 5
