"""The loop: examples -> rollout -> rewards -> advantages -> policy loss -> update -> log."""

from __future__ import annotations

import logging
import math
import shlex
import signal
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from customized_grpo.config import RunConfig, explain_batch, load_config
from customized_grpo.data.base import DataSource
from customized_grpo.devices import machine_error, memory_named
from customized_grpo.errors import (
    CheckpointError,
    CustomizedGRPOError,
    Interrupted,
    ResourceError,
    RewardError,
)
from customized_grpo.files import replace_folder
from customized_grpo.generators.base import Conditioning, Generator
from customized_grpo.generators.cache import CachedEncoder
from customized_grpo.rewards.attributes import AttributeClassifier
from customized_grpo.rewards.base import RewardSet
from customized_grpo.runs.checkpoint import (
    WEIGHTS,
    Checkpoint,
    CheckpointStore,
    Progress,
    TrainingState,
    newest_checkpoint,
)
from customized_grpo.runs.ema import Ema
from customized_grpo.runs.files import SAMPLES, checkpoint_folders, finished_updates, holds_run
from customized_grpo.runs.interrupts import Interrupts
from customized_grpo.runs.log import (
    RunLog,
    SilentLog,
    describe_environment,
    lock_folder,
    run_folder,
)
from customized_grpo.runs.ranks import ALONE, Ranks, connected
from customized_grpo.runs.resume import check_changes, remove_leftovers
from customized_grpo.runs.sharding import gathered, is_sharded, shard, whole
from customized_grpo.runs.sinks.base import check_sinks
from customized_grpo.training.advantages import assign_credit, objective_weights
from customized_grpo.training.build import build_world, make_optimizer, make_trainable
from customized_grpo.training.loss import accumulate_gradient, policy_batch
from customized_grpo.training.nonfinite import diagnose, dump_failure
from customized_grpo.training.rollout import (
    Share,
    collect_rollout,
    count_passes,
    make_policy,
    pick_device,
)
from customized_grpo.training.scoring_queue import ScoringQueue
from customized_grpo.training.validation import SampleGrid, Validation, rollout_metrics
from customized_grpo.types import Example, PolicyBatch, RewardScores, Rollout

logger = logging.getLogger("customized_grpo")

_NUM_SAMPLES = 6  # rows of a sample grid


def train(config: RunConfig, *, resume: bool = False, allow_changed: bool = False) -> Path:
    """Trains as the config says and returns the run folder.

    Everything is loaded and checked before the folder is created: a mistake leaves nothing behind.

    Args:
        config: of the run.
        resume: go on with the run that is in the folder, from its newest checkpoint, if there is
            one; what it computes is what it would have computed without the break.
        allow_changed: resume although the config has changed in a way that makes it another run.

    Raises:
        CustomizedGRPOError: with one line that names the field and the fix.
    """
    with connected() as ranks, memory_named():
        if not ranks.first:
            logger.setLevel(logging.WARNING)
        return _train(config, ranks, resume=resume, allow_changed=allow_changed)


def _train(config: RunConfig, ranks: Ranks, *, resume: bool, allow_changed: bool) -> Path:
    folder = run_folder(config, resume=resume)
    if resume and holds_run(folder):
        check_changes(load_config(folder / "config.yaml"), config, allow_changed=allow_changed)
        ended = finished_updates(folder)
        if ended == config.train.num_updates:
            logger.info("%s is finished, there is nothing to resume", folder)
            return folder
        if ended is not None and ended not in [int(f.name) for f in checkpoint_folders(folder)]:
            raise CheckpointError(
                f"RUN: {folder} has ended after update {ended} and kept no checkpoint of that "
                "(train.save_every 0), so it cannot be made longer; start another run"
            )
    check_sinks(config.sinks)
    device = pick_device(config.device)
    data, generator = build_world(config, device)
    rewards = RewardSet(config.rewards, device)
    evaluators = RewardSet(config.evaluators, device, "evaluators")
    if config.evaluation.classifier is not None:  # used after training; a mistake shows before
        AttributeClassifier.load(config.evaluation.classifier, device)
    torch.manual_seed(config.seed)
    make_trainable(generator, config)
    if config.fsdp and ranks.size > 1:
        shard(generator.transformer, device, ranks.size)
    samples = SampleGrid(generator, config, data.held_out(_NUM_SAMPLES))
    every = config.evaluation.validate_every
    validation = Validation(generator, config, data, rewards, evaluators) if every else None
    ranks.wait()  # all have checked the folder before the first one makes it
    with lock_folder(folder) if ranks.first else nullcontext():
        if ranks.first:
            run_folder(config, resume=resume)  # another process may have been faster
        checkpoint = _common_checkpoint(folder, ranks)
        if ranks.first:
            remove_leftovers(folder, checkpoint.update if checkpoint else 0)
        log = RunLog(folder, config, device) if ranks.first else SilentLog(folder)
        trainer = Trainer(config, data, generator, rewards, samples, validation, log, ranks)
        logger.info(explain_batch(config))
        trainer.start(checkpoint)
        trainer.run()
    return folder


def _common_checkpoint(folder: Path, ranks: Ranks) -> Checkpoint | None:
    """The newest one, which every process has to find.

    Raises:
        CheckpointError: if one does not.
    """
    ranks.wait()
    checkpoint = newest_checkpoint(folder)
    if len(set(ranks.collect(str(checkpoint and checkpoint.folder)))) > 1:
        raise CheckpointError(
            f"{folder}: the processes find different checkpoints; the run folder must be on a file "
            "system that all of them share"
        )
    return checkpoint


class Trainer:
    """Holds what lives as long as the run; ``run`` is the story."""

    def __init__(
        self,
        config: RunConfig,
        data: DataSource,
        generator: Generator,
        rewards: RewardSet,
        samples: SampleGrid,
        validation: Validation | None,
        log: RunLog,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.data, self.generator, self.ranks = config, data, generator, ranks
        self.rewards, self.samples, self.log = rewards, samples, log
        self.validation = validation
        cached = CachedEncoder(generator, config.generator, config.cache)
        self.encode = cached if data.listed() else generator.encode
        self.policy = make_policy(generator, config)
        self.parameters = [p for p in generator.transformer.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, config.train)
        decay = config.train.ema_decay
        self.ema = None if decay is None else Ema(generator.transformer, decay)
        self.state = TrainingState(generator.transformer, self.optimizer, self.ema)
        self.store = CheckpointStore(log.folder, config.train.keep_checkpoints)
        self.interrupts = Interrupts()
        self.progress = Progress()
        self._saved: int | None = None  # update of the newest checkpoint
        self._whole = True  # False from the first update of a rollout until it is used up
        self._micro_batch_size = config.train.micro_batch_size  # halved where it does not fit
        self._common_error: CustomizedGRPOError | None = None

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Brings everything to where the run begins or goes on.

        Raises:
            CheckpointError: if the checkpoint does not fit.
        """
        if checkpoint is None:
            self.log.rewind(update=-1, rollouts=0)
            return
        try:
            self.state.load(checkpoint.tensors())
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.folder}: {error}") from error
        self.progress = Progress(**checkpoint.record["progress"])
        self.rewards.restore(checkpoint.record["rewards"])
        if self.validation is not None:
            self.validation.evaluators.restore(checkpoint.record["evaluators"])
        self._saved = self.progress.update
        self.log.rewind(update=self.progress.update, rollouts=self.progress.rollouts)
        before, now = checkpoint.record["environment"], describe_environment(self.generator.device)
        for name, value in now.items():
            if before.get(name) != value:
                logger.warning("resumed with another %s: %s -> %s", name, before.get(name), value)
        logger.info("resumed from %s", checkpoint.folder)

    def run(self) -> None:
        """All rollouts and their updates.

        Raises:
            CustomizedGRPOError: whatever stops the run; it says how to go on.
        """
        with self.interrupts:  # also while the end is written, or what can be rescued
            try:
                with self.log.feeding():
                    self._run()
            except Exception as error:
                if error is self._common_error:
                    self.ranks.wait()  # whoever ends first makes the launcher end the others
                raise
            self.ranks.wait()  # for the sinks

    def _run(self) -> None:
        try:
            with self.log.progress(self.progress.update):
                if self._saved is None:
                    self._log_start()
                while self.progress.update < self.config.train.num_updates:
                    self._stop_if_asked()
                    self._iterate(self.progress.rollouts)
            self._finish()
        except Exception as error:
            way_on, machine = self._rescue(error is self._common_error), machine_error(error)
            self.log.stop(f"{machine or str(error) or type(error).__name__}; {way_on}")
            if isinstance(error, CustomizedGRPOError):
                error.args = (f"{error}; {way_on}",)
            elif machine is not None:
                raise ResourceError(f"{machine}; {way_on}") from error
            else:  # a bug, in a plug or here: its traceback is wanted
                logger.error("%s", way_on)
            raise

    def _rescue(self, common: bool) -> str:
        """Saves what can be saved; returns how to go on. What fails here must not hide why."""
        resume = f"`cgrpo resume {shlex.quote(str(self.log.folder))}` goes on"
        if not self._takes_part:
            return resume
        update = self.progress.update
        try:
            possible = common or not self._sharded  # parts of the others are needed
            if self._whole and update and self._saved != update and possible:
                self._save_checkpoint()
            self.store.wait()
        except Exception as second:
            what = machine_error(second) or second
            logger.warning("update %d could not be saved: %s", update, what)
        try:
            newest = newest_checkpoint(self.log.folder)
        except CheckpointError as second:
            return str(second)
        return f"{resume} after update {newest.update if newest else 0}"

    def _common(self, error: CustomizedGRPOError) -> CustomizedGRPOError:
        """An error that all processes raise at this point."""
        self._common_error = error
        return error

    def _stop_if_asked(self) -> None:
        """All processes stop together, whichever of them a signal has reached."""
        if self.ranks.any(self.interrupts.received is not None):
            raise self._common(Interrupted(self.interrupts.received or signal.SIGTERM))

    def _finish(self) -> None:
        with self._averaged(), gathered(self.generator.transformer, here=self.ranks.first):
            if self.ranks.first:
                replace_folder(self.log.folder / WEIGHTS, self.generator.save_weights)
        self._save_samples()
        if self._saved != self.progress.update and self.config.train.save_every:
            self._save_checkpoint()
        self.store.wait()
        self.log.finish(self.progress.update)

    def _log_start(self) -> None:
        sigmas, objectives = self.policy.sigmas, self.rewards.objectives
        weights = objective_weights(sigmas[:-1], self.config.advantage, objectives)
        self.log.schedule(sigmas, weights, objectives)
        self._save_samples()
        self.progress.validation = self._validate()
        self.progress.base = self.progress.validation
        if self.progress.base:
            self.log.row(0, self.progress.base)

    def _iterate(self, number: int) -> None:
        config, log = self.config, self.log
        random = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
        group_ids = torch.arange(config.rollout.prompts_per_rollout).repeat_interleave(
            config.rollout.group_size
        )
        shares = self.ranks.shares([self._rows(groups) for groups in self._split_groups()])
        mine = shares[self.ranks.rank]
        my_groups, place = group_ids[mine].unique(return_inverse=True)
        with log.timed("data"):
            prompts = self.data.training(number, config.rollout.prompts_per_rollout)
            per_prompt = self.encode([prompts[group] for group in my_groups.tolist()])
        share = Share(num_groups=len(prompts), rows=mine, num_passes=self._passes(shares))
        rollout, scores = self._sample_and_score(prompts, per_prompt, random, share, shares)
        for error in scores.errors:
            logger.warning("rollout %d: %s", number, error)
        device, objectives = rollout.images.device, self.rewards.objectives
        advantages = assign_credit(
            scores.scores,
            group_ids.to(device),
            rollout.sigmas,
            config.advantage,
            config.rewards,
            objectives,
        )
        if not advantages.valid.any():
            text = "; ".join(scores.errors) or "all scores are NaN"
            raise self._common(
                RewardError(f"rewards: no image of rollout {number} could be scored; {text}")
            )
        log.advantages(number, advantages.per_objective, objectives)
        metrics = rollout_metrics(scores, advantages, group_ids.to(device), objectives)
        metrics |= {f"reward/{name}": value for name, value in self.rewards.metrics().items()}
        conditioning = per_prompt.take(place.to(device))
        advantages = advantages.take(mine.to(device))
        for inner, groups in enumerate(self._split_groups()):
            samples = torch.isin(rollout.group_ids, groups.to(rollout.group_ids.device))
            batch = policy_batch(rollout, advantages, samples.nonzero()[:, 0])
            with log.timed("update"):
                stats = self._optimize(batch, conditioning, first=inner == 0)
            self.progress.update += 1
            self.progress.validation = self._validate()
            log.row(self.progress.update, {**metrics, **stats, **self.progress.validation})
            metrics = {}
            self._after_update()
        self.progress.rollouts += 1
        self._whole = True
        self._after_rollout()

    def _passes(self, shares: Sequence[Tensor]) -> int:
        """Passes of the process that has the most to sample."""
        rollout = self.config.rollout
        groups = [len((share // rollout.group_size).unique()) for share in shares]
        counts = zip(groups, map(len, shares), strict=True)
        return max(count_passes(rollout, *count) for count in counts) if self._sharded else 0

    def _rows(self, groups: Tensor) -> Tensor:
        """The samples of some groups, among those of the whole rollout."""
        size = self.config.rollout.group_size
        return (groups[:, None] * size + torch.arange(size)).flatten()

    def _sample_and_score(
        self,
        prompts: Sequence[Example],
        per_prompt: Conditioning,
        random: torch.Generator,
        share: Share,
        shares: Sequence[Tensor],
    ) -> tuple[Rollout, RewardScores]:
        """This process's samples, and the scores of all processes' ``[B, R]``.

        Scoring goes on beside sampling; ``seconds/reward`` is what it takes beyond it.
        """
        config, log = self.config, self.log

        def hand_over(images: Tensor, groups: Tensor) -> None:
            if self.ranks.size == 1:  # several stop together, between rollouts
                self.interrupts.check()
            queue.put(images, [prompts[i] for i in groups.tolist()])

        with ScoringQueue(self.rewards.score) as queue:
            with log.timed("rollout"):
                rollout = collect_rollout(
                    self.policy,
                    per_prompt,
                    config.rollout,
                    random,
                    keep_means=config.loss.ratio_norm,
                    on_images=hand_over,
                    share=share,
                )
            with log.timed("reward"):
                scores = self._settled(queue.result(), rollout, prompts)
                finite = rollout.log_probs.isfinite().all(1, keepdim=True)
                whole = self.ranks.gather(scores.scores.where(finite, torch.nan), shares)
        return rollout, replace(scores, scores=whole)

    def _settled(
        self, scores: RewardScores, rollout: Rollout, prompts: Sequence[Example]
    ) -> RewardScores:
        """Scores with few enough gaps; lost ones are scored again after longer and longer pauses.

        Raises:
            RewardError: if too much is still missing at the end.
        """
        faults = self.config.faults
        pauses = iter(faults.reward_pauses)
        while True:
            lost = scores.scores.isnan().any(1)
            share = self.ranks.total(int(lost.sum())) / self.ranks.total(len(lost))
            if share <= faults.max_lost_rewards:
                return scores
            text = "; ".join(scores.errors) or "all scores of these images are NaN"
            what = f"{share:.0%} of the rollout could not be scored: {text}"
            failing = self.ranks.any(bool(scores.errors))  # a NaN without a reason stays one
            pause = next(pauses, None) if failing else None
            if pause is None:
                raise self._common(RewardError(f"rewards: {what}"))
            logger.warning("%s; trying again in %g s", what, pause)
            self.interrupts.sleep(pause)
            self._stop_if_asked()
            rows = lost.nonzero()[:, 0]
            if not len(rows):
                continue
            again = self.rewards.score(
                rollout.images[rows], [prompts[i] for i in rollout.group_ids[rows].tolist()]
            )
            filled = scores.scores.clone()
            filled[rows] = again.scores
            scores = replace(again, scores=filled)

    def _validate(self) -> dict[str, float]:
        every, last = self.config.evaluation.validate_every, self.config.train.num_updates
        update = self.progress.update
        if self.validation is None or (update % every and update != last):
            return {}
        with self.log.timed("validation"), self._averaged():
            images = self.validation.sample() if self._takes_part else None
        metrics = (
            self.validation.metrics(images) if images is not None and self.ranks.first else None
        )
        return self.ranks.share(metrics)

    def _split_groups(self) -> tuple[Tensor, ...]:
        count = self.config.rollout.prompts_per_rollout
        return torch.arange(count).split(count // self.config.train.inner_updates)

    def _optimize(self, batch, conditioning, *, first: bool) -> dict[str, float]:
        train, loss = self.config.train, self.config.loss
        pinned = loss.pin_ratio and first
        self.optimizer.zero_grad(set_to_none=True)
        stats = accumulate_gradient(
            self.policy,
            batch,
            conditioning,
            loss,
            pinned=pinned,
            micro_batch_size=self._micro_batch_size,
            ranks=self.ranks,
        )
        if "micro_batch_size" in stats:
            self._micro_batch_size = int(stats["micro_batch_size"])
        if not first:  # off policy by then: the ratio itself is the number to look at
            stats.pop("mismatch", None)  # no sample may have been valid
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, train.max_grad_norm)).item()
        if not math.isfinite(norm):
            self._skip(batch, conditioning, pinned)
            self._whole = False
            return {**stats, "grad_norm": norm, "skipped_updates": 1.0}
        self.progress.skipped = 0
        self._whole = False
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        return {**stats, "grad_norm": norm, "skipped_updates": 0.0}

    def _skip(self, batch: PolicyBatch, conditioning: Conditioning, pinned: bool) -> None:
        """Leaves the weights as they are, and says why.

        Raises:
            CheckpointError: if it is one too many in a row.
        """
        self.progress.skipped += 1
        update = self.progress.update + 1
        size, transformer = self._micro_batch_size, self.generator.transformer
        report = diagnose(self.policy, batch, conditioning, transformer, size, self.ranks)
        logger.warning("update %d is skipped: %s", update, report)
        if self.progress.skipped < self.config.faults.max_skipped_updates:
            return
        rank = "" if self.ranks.size == 1 else f"-rank{self.ranks.rank}"
        folder = self.log.folder / "failures" / f"{update:06d}{rank}"
        state = self.state.tensors()
        dump_failure(folder, self.config, report, batch, conditioning, state, pinned)
        raise self._common(
            CheckpointError(
                f"{self.progress.skipped} updates in a row had no finite gradient: {report}; "
                f"`cgrpo replay {shlex.quote(str(folder))}` shows it again"
            )
        )

    def _after_update(self) -> None:
        every, update = self.config.train.sample_every, self.progress.update
        if every and update % every == 0 and update != self.config.train.num_updates:
            self._save_samples()

    def _after_rollout(self) -> None:
        """A checkpoint is due: by the clock of updates, or because this is the best so far."""
        every, update = self.config.train.save_every, self.progress.update
        best = self.progress.note_best()
        due = every and update // every != (update - self.config.train.inner_updates) // every
        if every and (due or best) and update != self.config.train.num_updates:
            self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        with self.log.timed("checkpoint"):
            tensors = self.state.tensors() if self._takes_part else {}
            with self._averaged(), gathered(self.generator.transformer, here=self.ranks.first):
                if self.ranks.first:
                    self._write_checkpoint(tensors)
        self._saved = self.progress.update

    def _write_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        self.log.sync()
        record = {
            "progress": asdict(self.progress),
            "score": self.progress.score(),
            "rewards": self.rewards.metrics(),
            "evaluators": self.validation.evaluators.metrics() if self.validation else {},
            "environment": describe_environment(self.generator.device),
        }
        self.store.save(self.progress.update, tensors, record, self.generator.save_weights)

    def _save_samples(self) -> None:
        if not self._takes_part:
            return
        with self._averaged():
            now = self.samples.sample()
        if self.ranks.first:
            file = self.log.folder / SAMPLES / f"{self.progress.update:06d}.png"
            self.samples.save(file, now)
            self.log.picture(self.progress.update, file)

    @property
    def _sharded(self) -> bool:
        return is_sharded(self.generator.transformer)

    @property
    def _takes_part(self) -> bool:
        """In what the first process needs; others have to if they hold parts of the weights."""
        return self.ranks.first or self._sharded

    def _averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are those that are saved: their average, if there is one."""
        return nullcontext() if self.ema is None else self.ema.applied()
