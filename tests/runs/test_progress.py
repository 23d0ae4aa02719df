"""Work that takes long is said to go on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import wait_until

from customized_grpo.config import RunConfig
from customized_grpo.runs import log as log_module
from customized_grpo.runs.log import RunLog
from customized_grpo.runs.progress import heartbeat, working


@pytest.fixture(autouse=True)
def _say_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="customized_grpo")


def test_a_heartbeat_says_what_goes_on_until_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    done = iter(range(1000))
    with heartbeat(lambda: f"drawing {next(done)}", every=0.01):
        wait_until(lambda: len(caplog.messages) >= 2)
    said = list(caplog.messages)
    assert [text.split(",")[0] for text in said[:2]] == ["drawing 0", "drawing 1"]
    assert said[0].endswith(" s now")
    with pytest.raises(KeyError), heartbeat(lambda: "failing", every=60):
        raise KeyError  # at once: nothing waits for a minute to be over
    assert caplog.messages == said


def test_work_is_said_from_the_start(caplog: pytest.LogCaptureFixture) -> None:
    with working("base: pictures 1 of 4", 8) as on_step:
        assert caplog.messages == ["base: pictures 1 of 4"]
        on_step()
    assert len(caplog.messages) == 1


def test_a_stage_is_on_the_bar_or_has_a_heartbeat(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunLog(Path(tiny_config.output_dir, "log"), tiny_config, torch.device("cpu"))
    said: list[str] = []

    def beat(describe: Callable[[], str]) -> AbstractContextManager[None]:
        said.append(describe())
        return nullcontext()

    monkeypatch.setattr(log_module, "heartbeat", beat)
    with log.progress(1), log.timed("rollout"):
        assert said == ["rollout, after update 1 of 2"]
    log._progress = bar, task = Mock(), 0
    with log.timed("validation"):
        bar.update.assert_called_once_with(task, stage="validation")
    assert len(said) == 1
