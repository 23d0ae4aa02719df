"""Dumps of an update without a finite gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from customized_grpo.config import RunConfig
from customized_grpo.errors import CheckpointError
from customized_grpo.generators.base import Conditioning
from customized_grpo.training.nonfinite import Diagnosis, dump_failure, load_failure
from customized_grpo.types import PolicyBatch


def test_the_dumps_of_several_processes_share_the_state_of_the_first(
    tiny_config: RunConfig, tmp_path: Path
) -> None:
    """It may be larger than a host's memory, and is the same for all."""
    nothing = Diagnosis(parameters=(), gradients=(), inputs=(), pairs=())
    conditioning = Conditioning(per_sample={"reference_latents": torch.zeros(2, 1, 1)}, shared={})
    state = {"policy/weight": torch.ones(3)}
    for rank in (0, 1):
        names = ("latents", "next_latents", "old_log_prob", "advantage", "weight")
        numbers = {name: torch.full((2,), float(rank)) for name in names}
        rows = {name: torch.zeros(2, dtype=torch.int64) for name in ("step_index", "sample_index")}
        batch = PolicyBatch(losses=tiny_config.algorithm.losses, **numbers, **rows)
        folder = tmp_path / f"000007-rank{rank}"
        kept = {} if rank else state
        dump_failure(folder, tiny_config, nothing, batch, conditioning, kept, pinned=True)
    of_second = tmp_path / "000007-rank1", tiny_config, torch.device("cpu")
    batch, _, found, pinned = load_failure(*of_second)
    assert pinned
    assert batch.advantage.tolist() == [1, 1]
    assert found["policy/weight"].tolist() == [1, 1, 1]
    (tmp_path / "000007-rank0" / "state.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"000007-rank1 needs .*000007-rank0/state.safetensors"
    ):
        load_failure(*of_second)
