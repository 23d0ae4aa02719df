"""`cgrpo replay`: an update that failed, computed once more from its dump."""

from __future__ import annotations

from pathlib import Path

from customized_grpo.config import load_config
from customized_grpo.errors import CheckpointError
from customized_grpo.runs.checkpoint import TrainingState
from customized_grpo.runs.ema import Ema
from customized_grpo.training.build import build_generator, make_optimizer, make_trainable
from customized_grpo.training.loss import accumulate_gradient
from customized_grpo.training.nonfinite import REPORT, Diagnosis, diagnose, load_failure
from customized_grpo.training.rollout import make_policy, pick_device


def replay(folder: Path) -> Diagnosis:
    """Loss and gradient of the update in a dump, and what is not finite in them.

    Raises:
        CheckpointError: if the folder is no dump.
    """
    if not (folder / REPORT).exists():
        raise CheckpointError(
            f"DUMP: {folder} must be a folder that a run has written under failures/"
        )
    config = load_config(folder / "config.yaml")
    device = pick_device(config.device)
    generator = build_generator(config, device)
    make_trainable(generator, config)
    batch, conditioning, state, pinned = load_failure(folder, device)
    transformer = generator.transformer
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    decay = config.train.ema_decay
    ema = None if decay is None else Ema(transformer, decay)
    TrainingState(transformer, make_optimizer(parameters, config.train), ema).load(state)
    policy, size = make_policy(generator, config), config.train.micro_batch_size
    accumulate_gradient(
        policy,
        batch,
        conditioning,
        config.loss,
        pinned=pinned,
        micro_batch_size=size,
    )
    return diagnose(policy, batch, conditioning, transformer, size)
