"""A run that votes alone train: by somebody who likes red."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="cgrpo vote needs the extra [playground]")

from families import FAMILIES, run_config
from helpers import changed, metrics
from voter import Voter

from customized_grpo.config import ConstantSchedule, NftAlgorithm, check_config
from customized_grpo.errors import Interrupted
from customized_grpo.rewards.ballots import VOTES
from customized_grpo.rewards.votes import VotesConfig
from customized_grpo.training.train import train

UPDATES = 8


@pytest.mark.slow
def test_redness_goes_up_by_votes_alone(tmp_path: Path) -> None:
    """Stopped while it waits, in the first rollout, and resumed: no group is asked about twice."""
    FAMILIES[0].build(tmp_path / "checkpoint")
    config = run_config(
        FAMILIES[0], str(tmp_path / "checkpoint"), tmp_path, num_updates=UPDATES, learning_rate=3e-3
    )
    config = dataclasses.replace(
        config,
        algorithm=NftAlgorithm(),
        rewards=(VotesConfig(objective="prompt", choice="best-and-worst"),),
        evaluators=config.rewards[1:],  # redness itself looks on
        lora=None,
    )
    config = changed(
        config,
        advantage={"schedule": ConstantSchedule(prompt=1.0)},
        rollout={"dynamics": "ode", "shared_noise": False, "batch_size": 5},
        evaluation={"validate_every": UPDATES, "num_validation": 4},
    )
    folder, stop = tmp_path / "tiny", threading.Event()

    def stop_after_one(count: int) -> bool:
        if count == 1 and not stop.is_set():
            stop.set()  # a second signal would end the process at once
            os.kill(os.getpid(), signal.SIGTERM)
        return count == 0

    with Voter(folder / "votes", stop_after_one), pytest.raises(Interrupted):
        train(check_config(config))
    with Voter(folder / "votes") as voter:
        rows = metrics(train(check_config(config), resume=True))
    cast = [json.loads(line) for line in (folder / "votes" / VOTES).read_text().splitlines()]
    assert len({vote["group"] for vote in cast}) == len(cast) == 2 * UPDATES
    assert voter.ballots.asked() == []
    assert rows[1]["reward/votes/mean"] == 0  # one best and one worst of each group
    assert not any(name.startswith("validation/reward") for name in rows[0])
    before, after = (row["validation/prompt"] for row in (rows[0], rows[-1]))
    assert after > before + 0.05
