"""Trains by a config and writes beside it what this process kept of the last training state."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from customized_grpo.config import load_config
from customized_grpo.runs.checkpoint import TrainingState
from customized_grpo.tools.estimate.counting import count
from customized_grpo.training.train import train

file = Path(sys.argv[1])
inner = TrainingState.tensors


def tensors(self: TrainingState, **options: Any) -> Any:
    found: list[Any] = []
    counted = count(lambda: found.append(inner(self, **options)))
    kept = {"bytes": sum(t.nbytes for t in found[0].values()), "peak": counted.peak}
    (file.parent / f"kept-{os.environ['RANK']}.json").write_text(json.dumps(kept))
    return found[0]


TrainingState.tensors = tensors  # pyright: ignore
train(load_config(file))
