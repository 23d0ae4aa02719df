"""A run that feeds all three sinks: the same weights, the same numbers, stopped and resumed."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch
from chaos import small_run
from safetensors.torch import load_file
from sink_logs import points, with_sinks
from test_sink_tensorboard import scalars, single
from test_sink_wandb import history, offline_runs

from customized_grpo.runs.sinks.tensorboard import TensorBoardConfig
from customized_grpo.runs.sinks.trackio import TrackioConfig
from customized_grpo.runs.sinks.wandb import WandbConfig
from customized_grpo.training.session import Session
from customized_grpo.training.train import train

for package in ("tensorboard", "trackio", "wandb"):
    pytest.importorskip(package)


@pytest.mark.slow
def test_a_run_with_all_sinks_that_is_killed_and_resumed(
    tmp_path: Path, trackio_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    plain = small_run(tmp_path, "plain", 6)
    config = with_sinks(
        dataclasses.replace(plain, name="fed"),
        TensorBoardConfig(),
        WandbConfig(),
        TrackioConfig(project="dogs"),
    )
    with monkeypatch.context() as patch:
        patch.setattr(Session, "_save_checkpoint", _dies_at(4, Session._save_checkpoint))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    weights = [
        load_file(train(c, resume=True) / "weights" / "pytorch_lora_weights.safetensors")
        for c in (plain, config)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    run = tmp_path / "fed"
    wanted, plainly = points(run), points(tmp_path / "plain")
    assert wanted.keys() == plainly.keys()
    compared = [name for name in wanted if not name.startswith("seconds/")]
    assert all(wanted[name] == plainly[name] for name in compared)
    curves = scalars(run)
    with closing(sqlite3.connect(trackio_folder / "dogs.db")) as database:
        rows = [
            (step, name, value)
            for step, text in database.execute("SELECT step, metrics FROM metrics")
            for name, value in json.loads(text).items()
        ]
    for name in compared:
        assert curves[name] == [(step, single(value)) for step, value in wanted[name].items()]
        assert {step: value for step, n, value in rows if n == name} == wanted[name]
    assert len(rows) == len({(step, name) for step, name, _ in rows})
    newest = history(offline_runs(run)[-1])
    assert {name: newest[name] for name in compared} == {name: wanted[name] for name in compared}
    assert capfd.readouterr().err.count("Traceback") == 0


def _dies_at(update: int, save):
    def dying(self: Session) -> None:
        if self.progress.update == update:
            raise KeyboardInterrupt  # nothing in the package catches it
        save(self)

    return dying
