"""Trains as a config says: everything is loaded and checked, then the session begins."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

import torch

from customized_grpo.config import MeasuredSchedule, RunConfig, explain_batch, load_config
from customized_grpo.data.overview import remark_lines
from customized_grpo.devices import memory_named, pick_device, repeatable
from customized_grpo.errors import CheckpointError, ConfigError, within
from customized_grpo.rewards.attributes import AttributeClassifier
from customized_grpo.rewards.base import RewardSet
from customized_grpo.runs.checkpoint import Checkpoint, newest_checkpoint
from customized_grpo.runs.files import (
    CONFIG,
    checkpoint_folders,
    finished_updates,
    holds_run,
    why_stopped,
)
from customized_grpo.runs.log import RunLog, SilentLog, lock_folder, run_folder
from customized_grpo.runs.progress import heartbeat
from customized_grpo.runs.ranks import Ranks, connected
from customized_grpo.runs.resume import check_changes, remove_leftovers
from customized_grpo.runs.sharding import shard
from customized_grpo.runs.sinks.base import check_sinks
from customized_grpo.training.build import (
    build_world,
    find_optimizer,
    from_own_start,
    make_trainable,
)
from customized_grpo.training.loop import inner_rows
from customized_grpo.training.origins import recalled
from customized_grpo.training.session import Session
from customized_grpo.training.sizes import check_sizes
from customized_grpo.training.validation import NUM_SAMPLES, SampleGrid, Validation

logger = logging.getLogger("customized_grpo")


def train(config: RunConfig, *, resume: bool = False, allow_changed: bool = False) -> Path:
    """Trains as the config says and returns the run folder.

    Everything is loaded and checked before the folder is created: a mistake leaves nothing behind.

    Args:
        config: of the run.
        resume: go on with the run that is in the folder, from its newest checkpoint, if there is
            one; on the same CPU, or deterministic GPU, it computes what it would have computed
            without the break.
        allow_changed: resume although the config has changed in a way that makes it another run.

    Raises:
        CustomizedGRPOError: with one line that names the field and the fix.
    """
    with repeatable(config.deterministic), connected(config.device) as ranks, memory_named():
        if not ranks.is_first:
            logger.setLevel(logging.WARNING)
        folder = run_folder(config, resume=resume)
        if resume and holds_run(folder):
            before = load_config(folder / CONFIG, has_begun=True)
            check_changes(before, config, allow_changed=allow_changed)
            if _is_finished(folder, config):
                logger.info(
                    "%s is finished, there is nothing to resume; to go on, give a "
                    "--train.num_updates above %d",
                    folder,
                    config.train.num_updates,
                )
                return folder
        _train(config, folder, ranks, resume=resume)
        return folder


def _is_finished(folder: Path, config: RunConfig) -> bool:
    """Whether the run in the folder has made all updates it shall make, or an alarm has ended
    it, and still would.

    Raises:
        CheckpointError: if it has ended earlier and kept nothing that it could go on from.
    """
    ended = finished_updates(folder)
    if ended in (None, config.train.num_updates):
        return ended is not None
    if config.faults.hacking == "best" and (why := why_stopped(folder)):
        logger.info("%s", why)
        return True
    if ended not in [int(f.name) for f in checkpoint_folders(folder)]:
        raise CheckpointError(
            f"RUN: {folder} has ended after update {ended} and kept no checkpoint of that "
            "(train.save_every 0), so it cannot be made longer; start another run"
        )
    return False


def _train(config: RunConfig, folder: Path, ranks: Ranks, *, resume: bool) -> None:
    logger.info(explain_batch(config))
    check_sinks(config.sinks)
    find_optimizer(config.train)
    _check_judges(config)
    _check_even(config, ranks)
    ranks.split(inner_rows(config))  # refuses updates of fewer samples than there are processes
    device = pick_device(config.device)
    data, generator = build_world(config, device)
    check_sizes(generator, config)
    rewards = RewardSet(config.rewards, device)
    evaluators: RewardSet | None = RewardSet(config.evaluators, device, "evaluators")
    path = config.evaluation.classifier
    classifier = None if path is None else AttributeClassifier.load(path, device)
    if not config.evaluation.validate_every:  # needed after training; a mistake would have shown
        evaluators = classifier = None
    torch.manual_seed(config.seed)  # adapters are drawn from the global generator
    make_trainable(generator, from_own_start(config, folder))
    if config.fsdp and ranks.world_size > 1:
        is_cast = config.lora is None and config.mixed_precision == "bf16"
        dtype = torch.bfloat16 if is_cast else None
        shard(generator.transformer, device, ranks.world_size, dtype)
    logger.info("drawing sample pictures by the untrained model")
    with heartbeat(lambda: "drawing sample pictures"):
        samples = SampleGrid(generator, config, data.held_out(NUM_SAMPLES))
    validation = None
    if evaluators is not None:
        logger.info("encoding %d validation examples", config.evaluation.num_validation)
        with heartbeat(lambda: "encoding validation examples"):
            validation = Validation(generator, config, data, rewards, evaluators, classifier, ranks)
    ranks.barrier()  # all have checked the folder before the first one makes it
    with lock_folder(folder) if ranks.is_first else nullcontext():
        if ranks.is_first:
            run_folder(config, resume=resume)  # another process may have been faster
        checkpoint = _common_checkpoint(folder, ranks)
        done = checkpoint.update if checkpoint else 0
        _check_length(config, done)
        if checkpoint is not None:
            checkpoint = recalled(checkpoint, config)
        if ranks.is_first:
            remove_leftovers(folder, done)
        log = RunLog(folder, config, device) if ranks.is_first else SilentLog(folder)
        for people in rewards.people:
            people.begin(folder, ranks.rank)
        ranks.barrier()  # the first one forgets what was asked before
        session = Session(config, data, generator, rewards, samples, validation, log, ranks)
        for line in remark_lines(config, data):
            logger.info(line)
        logger.info("the first update begins; it takes longer than those after it")
        session.start(checkpoint)
        session.run()


def _check_judges(config: RunConfig) -> None:
    """Asks the servers of rewards and evaluators, before anything large is loaded and a rollout is
    sampled for one that is not there.

    Raises:
        CustomizedGRPOError: if one does not answer, refuses the key, or lacks what is asked for.
    """
    for section, plug in config.plugs().items():
        if section.startswith(("rewards.", "evaluators.")) and plug.hosts():
            with within(section):
                plug.check()


def _check_even(config: RunConfig, ranks: Ranks) -> None:
    """With FSDP a pass through the transformer is a meeting of all processes, so each has to take
    equally many: the same number of groups, or of parts of groups, in every update, and of prompts
    that are measured. Rewards that score groups have to find them whole in one process.

    Raises:
        ConfigError: if the groups of an update, or those prompts, do not divide by the processes.
    """
    prompts, size = config.rollout.prompts_per_rollout, ranks.world_size
    parts, unit, factors = config.train.inner_updates, size, f"processes ({size})"
    if config.train.split == "groups":  # else every update has a part of every group
        unit = parts * size
        factors = f"train.inner_updates x processes ({parts} x {size} = {unit})"
    schedule = config.advantage.schedule
    if isinstance(schedule, MeasuredSchedule) and schedule.num_prompts % size:
        raise ConfigError(
            f"advantage.schedule.num_prompts: must be a multiple of the processes ({size}), got "
            f"{schedule.num_prompts}; {-(-schedule.num_prompts // size) * size} would do"
        )
    ranked = [reward.label for reward in config.rewards if reward.is_groupwise and size > 1]
    reasons = ["fsdp"] * config.fsdp + [f"reward {label}, which scores groups" for label in ranked]
    if reasons and prompts % unit:
        fits = sorted({max(prompts // unit, 1) * unit, (prompts // unit + 1) * unit})
        raise ConfigError(
            f"rollout.prompts_per_rollout: must be a multiple of {factors} with {reasons[0]}, got "
            f"{prompts}; {' or '.join(map(str, fits))} would do"
        )


def _check_length(config: RunConfig, done: int) -> None:
    """Makes sure that a run which goes on after ``done`` updates can end.

    Raises:
        ConfigError: if it is to end before, or would not meet its end.
    """
    train = config.train
    if train.num_updates < done:
        raise ConfigError(
            f"train.num_updates must be at least {done}, the update of the run's newest "
            f"checkpoint, got {train.num_updates}; earlier weights are in its checkpoints/"
        )
    if done % train.inner_updates:
        raise ConfigError(
            f"train.inner_updates must divide the {done} updates that the run has made, got "
            f"{train.inner_updates}; a rollout would be used up beyond train.num_updates"
        )


def _common_checkpoint(folder: Path, ranks: Ranks) -> Checkpoint | None:
    """The newest one, which every process has to find.

    Raises:
        CheckpointError: if one does not.
    """
    ranks.barrier()
    checkpoint = newest_checkpoint(folder)
    if len(set(ranks.all_gather_object(str(checkpoint and checkpoint.folder)))) > 1:
        raise CheckpointError(
            f"{folder}: the processes find different checkpoints; the run folder must be on a file "
            "system that all of them share"
        )
    return checkpoint
