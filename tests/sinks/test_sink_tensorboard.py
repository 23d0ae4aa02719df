"""TensorBoard's own reader finds what is in metrics.jsonl."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from PIL import Image
from sink_logs import add, live_and_die, number, open_log, points

from customized_grpo.config import RunConfig
from customized_grpo.sinks.tensorboard import TensorBoardConfig

reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def accumulated(run: Path):
    everything = {"scalars": 0, "images": 0}
    return reading.EventAccumulator(str(run / "tensorboard"), everything).Reload()


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = accumulated(run)
    return {
        name: [(event.step, number(event.value)) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def single(value: float | None) -> float | None:
    """As it is in float32, which event files hold."""
    return None if value is None else struct.unpack("f", struct.pack("f", value))[0]


def test_the_numbers_are_those_of_the_log(tiny_config: RunConfig) -> None:
    log = open_log(tiny_config, TensorBoardConfig())
    with log.feeding():
        for update in range(4):
            add(log, update)
    wanted = points(log.folder)
    found = scalars(log.folder)
    assert found.keys() == wanted.keys()
    for name, steps in wanted.items():
        assert found[name] == [(step, single(value)) for step, value in steps.items()]


def test_pictures_are_there(tiny_config: RunConfig) -> None:
    log = open_log(tiny_config, TensorBoardConfig())
    with log.feeding():
        for update in range(3):
            add(log, update)
    images = accumulated(log.folder).Images("samples")
    assert [event.step for event in images] == [0, 2]
    shown = Image.open(io.BytesIO(images[1].encoded_image_string)).convert("RGB")
    assert (shown.size, shown.getpixel((0, 0))) == ((5, 3), (2, 0, 255))


def test_a_resumed_run_has_every_point_once(tiny_config: RunConfig) -> None:
    log = open_log(tiny_config, TensorBoardConfig())
    live_and_die(log)
    assert len(list((log.folder / "tensorboard").iterdir())) == 2
    found = scalars(log.folder)
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in accumulated(log.folder).Images("samples")] == [0, 2, 4, 6]


def test_points_whose_sending_was_not_noted_are_there_once(tiny_config: RunConfig) -> None:
    """As after kill -9 between the event and the note of it."""
    log = open_log(tiny_config, TensorBoardConfig())
    with log.feeding():
        for update in range(5):
            add(log, update)
    noted = log.folder / "sinks" / "tensorboard.json"
    noted.write_text(noted.read_text().replace('"sent": 4', '"sent": 2'))
    with log.feeding():
        add(log, 5)
    assert [step for step, _ in scalars(log.folder)["loss"]] == [1, 2, 3, 4, 5]
