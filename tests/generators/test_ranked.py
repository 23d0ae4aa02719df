"""A run that a ranking alone trains, against a server that ranks by redness."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="tests/servers.py needs the extra [serve]")

from families import FAMILIES, run_config
from helpers import changed, metrics
from servers import ranked_by_redness, scripted_server

from customized_grpo.rewards.endpoints.vlm_judge import VlmJudgeConfig
from customized_grpo.training.train import train


@pytest.mark.slow
@pytest.mark.long
def test_redness_goes_up_by_ranks_alone(tmp_path: Path) -> None:
    """In micro-batches that split the groups; redness itself looks on as the evaluator."""
    FAMILIES[0].build(tmp_path / "checkpoint")
    fields: dict[str, Any] = {"num_updates": 20, "learning_rate": 3e-3}
    config = run_config(FAMILIES[0], str(tmp_path / "checkpoint"), tmp_path, **fields)
    with scripted_server(ranked_by_redness) as (url, _):
        rank = VlmJudgeConfig(
            name="rank", objective="prompt", criterion="prompt-ranking", base_url=f"{url}/v1",
            model="m",
        )  # fmt: skip
        rewards = (rank, dataclasses.replace(rank, name="same", objective="identity"))
        seen = dataclasses.replace(
            config, rewards=rewards, evaluators=config.rewards[1:], lora=None
        )
        evaluation: dict[str, object] = {"validate_every": 20, "num_validation": 4}
        rows = metrics(train(changed(seen, rollout={"batch_size": 5}, evaluation=evaluation)))
    before, after = (row["validation/prompt"] for row in (rows[0], rows[-1]))
    assert rows[1]["reward/rank/mean"] == pytest.approx(0.5)
    assert not any(name.startswith("validation/reward") for name in rows[0])
    assert rows[-1]["reward/rank/requests"] == 2 * 20  # one for each group
    assert after > before + 0.05
