"""TensorBoard's own reader finds what is in metrics.jsonl."""

from __future__ import annotations

import io
import json
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from chaos import small_run
from PIL import Image
from sink_logs import add, live_and_die, number, open_log, points, with_sinks

from customized_grpo.config import RunConfig, dump_config
from customized_grpo.runs.sinks.tensorboard import TensorBoardConfig
from customized_grpo.training.train import train

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


@pytest.mark.parametrize(
    ("row", "picture", "file"),
    [(2, 2, 2), (4, 2, 4), (-1, -1, 0), (-1, 0, 0)],
    ids=["of two updates", "of a picture", "of anything", "of the base"],
)
def test_points_whose_sending_was_not_noted_are_there_once(
    tiny_config: RunConfig, row: int, picture: int, file: int
) -> None:
    """As after kill -9 between the event and the note of it."""
    log = open_log(tiny_config, TensorBoardConfig())
    with log.feeding():
        for update in range(5):
            add(log, update)
    note = log.folder / "sinks" / "tensorboard.json"
    noted = json.loads(note.read_text())
    (place,) = noted["sent"]
    assert noted["sent"][place] == {"row": 4, "picture": 4}
    note.write_text(json.dumps({**noted, "sent": {place: {"row": row, "picture": picture}}}))
    log.rewind(update=file, rollouts=0)
    with log.feeding():
        for update in range(file + 1, 6):
            add(log, update)
    assert [step for step, _ in scalars(log.folder)["loss"]] == [1, 2, 3, 4, 5]
    assert [step for step, _ in scalars(log.folder)["validation/clip-text"]] == [0]
    assert [event.step for event in accumulated(log.folder).Images("samples")] == [0, 2, 4]


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_is_killed_again_and_again_has_everything_once(tmp_path: Path) -> None:
    config = small_run(tmp_path, "killed", 6, "--train.sample_every", "2")
    config = with_sinks(config, TensorBoardConfig())
    (tmp_path / "run.yaml").write_text(dump_config(config))
    for moment in (
        ("in_base_validation", "0"),
        ("before_picture", "2"),
        ("before_note", "4"),
        ("before_picture", "6"),
    ):
        program = Path(__file__).with_name("deadly.py")
        life = [sys.executable, str(program), str(tmp_path / "run.yaml"), *moment]
        ended = subprocess.run(life, capture_output=True, text=True, timeout=200)
        assert ended.returncode == -signal.SIGKILL, ended.stderr[-3000:]
    run = train(config, resume=True)
    wanted, found = points(run), scalars(run)
    assert list(wanted["validation/clip-text"]) == [0, 4, 6]
    for name, steps in wanted.items():
        if not name.startswith("seconds/"):  # of updates that were computed again
            assert found[name] == [(step, single(value)) for step, value in steps.items()]
    assert [event.step for event in accumulated(run).Images("samples")] == [0, 2, 4, 6]
