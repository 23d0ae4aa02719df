"""What a run keeps from its start, and whether that is still so when it goes on otherwise."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from typing import Any

from customized_grpo.config import MeasuredSchedule, RunConfig
from customized_grpo.config.decoding import to_raw
from customized_grpo.runs.checkpoint import Checkpoint
from customized_grpo.training.advantages import Measured, check_levels
from customized_grpo.training.rollout import one_step_rollouts

logger = logging.getLogger("customized_grpo")

_FORGOTTEN = {
    "rewards": "the base's mean scores by other rewards",
    "validation": "the base's validation, and what was best, by other models or pictures",
    "noise": "what the noise of each step moved, by other rewards or steps",
}


def origins(config: RunConfig) -> dict[str, str]:
    """Digests of the fields behind what a run keeps from its start: scores of the base by its
    ``rewards`` and in its ``validation``, and shares of ``noise``. By other fields they are others.
    """
    schedule, noise, rollout = config.advantage.schedule, None, config.rollout
    if isinstance(schedule, MeasuredSchedule):
        steps = one_step_rollouts(rollout, schedule.num_samples).values()
        sampled = [replace(step, batch_size=None) for step in steps]
        noise = (config.seed, config.data, config.rewards, schedule, *sampled)
    # The rest of the section decides what is evaluated at the end, how often, and how fast.
    own = replace(
        config.evaluation,
        num_steps=config.evaluation.num_steps or rollout.num_steps,
        num_examples=1,
        validate_every=1,
        batch_size=None,
    )
    drawn = (config.data, config.mixed_precision, rollout.shift, own)
    found = {
        "rewards": config.rewards,
        "validation": (config.rewards, config.evaluators, *drawn),
        "noise": noise,
    }
    return {name: _digest(to_raw(value)) for name, value in found.items()}


def _digest(raw: object) -> str:
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def recalled(checkpoint: Checkpoint, config: RunConfig) -> Checkpoint:
    """The checkpoint without what is not so with this config.

    Raises:
        ConfigError: if the shaping needs what the base scored, and that is not known.
    """
    record: dict[str, Any] = dict(checkpoint.record)
    before, now = record.get("origins", {}), origins(config)
    changed = [name for name, digest in before.items() if now.get(name) != digest]
    measured, progress = record.get("measured", {}), record["progress"]
    if "rewards" in changed:
        measured = measured | {"levels": ()}
    if "noise" in changed:
        measured = measured | {"noise_shares": ()}
    if "validation" in changed:
        progress = progress | {"base": {}, "best": None}
        record |= {"hacking": {}, "base_scores": {}}
    for name in changed:
        logger.info("no longer known: %s", _FORGOTTEN[name])
    if progress["rollouts"]:
        check_levels(config.advantage, Measured.of(measured))
    return replace(checkpoint, record=record | {"measured": measured, "progress": progress})
