"""A loop on the embedded models, ready for its updates to be compared with those of plain code."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import perturb_lora

from customized_grpo.config import RunConfig
from customized_grpo.rewards.base import RewardSet
from customized_grpo.runs.interrupts import Interrupts
from customized_grpo.runs.log import SilentLog
from customized_grpo.training.build import build_world, make_trainable
from customized_grpo.training.loop import Loop

LEARNING_RATE = 5.0  # moves the ratio beyond the clip range, as AdamW does in a run


def make_loop(config: RunConfig, folder: Path) -> Loop:
    """A loop with trained adapters, and plain gradient descent, which is linear in the gradient."""
    device = torch.device("cpu")
    data, generator = build_world(config, device)
    torch.manual_seed(0)
    make_trainable(generator, config)
    perturb_lora(generator.transformer)
    rewards, log = RewardSet(config.rewards, device), SilentLog(folder)
    loop = Loop(config, data, generator, rewards, log, Interrupts(), lambda *_: None)
    loop.optimizer = torch.optim.SGD(loop.parameters, LEARNING_RATE)
    return loop
