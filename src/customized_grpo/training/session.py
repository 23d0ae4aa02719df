"""The life of a run around the loop: begin or go on, log, validate, save, stop, rescue."""

from __future__ import annotations

import logging
import shlex
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict

from torch import Tensor

from customized_grpo.config import RunConfig
from customized_grpo.data.base import DataSource
from customized_grpo.devices import machine_error
from customized_grpo.errors import (
    CheckpointError,
    CustomizedGRPOError,
    ResourceError,
    RewardError,
    everywhere,
)
from customized_grpo.files import replace_folder
from customized_grpo.generators.base import Conditioning, Generator
from customized_grpo.rewards.base import RewardSet
from customized_grpo.runs.checkpoint import (
    WEIGHTS,
    Checkpoint,
    CheckpointStore,
    Progress,
    TrainingState,
    newest_checkpoint,
)
from customized_grpo.runs.files import FAILURES, SAMPLES, START
from customized_grpo.runs.interrupts import Interrupts
from customized_grpo.runs.log import RunLog, describe_environment
from customized_grpo.runs.ranks import ALONE, Ranks
from customized_grpo.runs.sharding import gathered
from customized_grpo.runs.sinks.feed import feeding
from customized_grpo.training.advantages import Measured, objective_weights, one_sided
from customized_grpo.training.clock import Clock
from customized_grpo.training.hacking import end_with_best
from customized_grpo.training.loop import Loop
from customized_grpo.training.nonfinite import diagnose, dump_failure
from customized_grpo.training.origins import origins
from customized_grpo.training.validation import SampleGrid, Validation
from customized_grpo.types import Batch

logger = logging.getLogger("customized_grpo")


class Session:
    """A run from its beginning, or from a checkpoint, to its end; ``run`` is the story."""

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
        self.config, self.generator, self.ranks = config, generator, ranks
        self.rewards, self.samples, self.validation, self.log = rewards, samples, validation, log
        self.interrupts = Interrupts(ranks)
        judges = validation.evaluators if validation and config.loss.kl_share < 1 else None
        self.loop = Loop(
            config, data, generator, rewards, log, self.interrupts, self._skip, ranks, judges
        )
        self.state = TrainingState(
            generator.transformer, self.loop.optimizer, self.loop.ema, self.loop.algorithm.old
        )
        self.store = CheckpointStore(log.folder, config.train.keep_checkpoints)
        self.progress = Progress()
        train = config.train
        self._save_clock = Clock(train.save_every, train.minutes("save"), ranks)
        self._sample_clock = Clock(train.sample_every, train.minutes("sample"), ranks)
        self._saved: int | None = None  # update of the newest checkpoint
        self._alarm = ""  # of this rollout's validation

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Brings everything to where the run begins or goes on.

        Raises:
            CheckpointError: if the checkpoint does not fit.
        """
        sigmas, steps = self.loop.policy.sigmas, self.loop.algorithm.steps
        warning = one_sided(sigmas, steps, self.config.advantage)
        if self.ranks.is_first and warning:
            logger.warning("%s", warning)
        if checkpoint is None:
            self.log.rewind(update=-1, rollouts=0)
            return
        try:
            self.state.load(checkpoint.tensors())
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.folder}: {error}") from error
        self.progress = Progress(**checkpoint.record["progress"])
        kept = checkpoint.record.get("factors", {})
        self.loop.factors |= {name: kept[name] for name in self.loop.factors if name in kept}
        self.loop.measured = Measured.of(checkpoint.record.get("measured", {}))
        self.rewards.restore(checkpoint.record["rewards"])
        if self.validation is not None:
            self.validation.evaluators.restore(checkpoint.record["evaluators"])
            self.validation.alarm.state = checkpoint.record.get("hacking", {})
            self.validation.gains.base = checkpoint.record.get("base_scores", {})
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
        sinks = self.config.sinks if self.ranks.is_first else ()
        # Signals are guarded also while the end is written, or what can be rescued.
        with self.interrupts:
            try:
                with feeding(sinks, self.config, self.log.folder):
                    self._run_or_rescue()
            except CustomizedGRPOError as error:
                if error.is_everywhere:
                    self.ranks.barrier()  # whoever ends first makes the launcher end the others
                raise
            self.ranks.barrier()  # the first one may still be busy with the sinks

    def _run_or_rescue(self) -> None:
        try:
            with self.log.progress(self.progress.update):
                self._run()
        except Exception as error:
            is_everywhere = isinstance(error, CustomizedGRPOError) and error.is_everywhere
            way_on, machine = self._rescue(is_everywhere), machine_error(error)
            self.log.stop(f"{machine or str(error) or type(error).__name__}; {way_on}")
            if isinstance(error, CustomizedGRPOError):
                error.args = (f"{error}; {way_on}",)
            elif machine is not None:
                raise ResourceError(f"{machine}; {way_on}") from error
            else:  # a bug, in a plug or here: its traceback is wanted
                logger.error("%s", way_on)
            raise

    def _run(self) -> None:
        if self.validation is not None and self.config.faults.hacking == "best":
            self._alarm = self.validation.alarm.raised()  # and was killed before it had ended
            if self._is_ended_by_alarm():
                return
        self.loop.measure()
        self._log_schedule()
        if self._saved is None:
            self._log_start()
        while self.progress.update < self.config.train.num_updates:
            self.interrupts.check_together()
            for metrics in self.loop.iterate(self.progress.rollouts):
                self._after_update(metrics)
            self.progress.rollouts += 1
            self._after_rollout()
            if self._is_ended_by_alarm():
                return
        self._finish()

    def _log_schedule(self) -> None:
        sigmas, objectives = self.loop.policy.sigmas, self.rewards.objectives
        advantage, measured = self.config.advantage, self.loop.measured
        weights = objective_weights(sigmas[:-1], advantage, objectives, measured)
        self.log.schedule(sigmas, weights, objectives)

    def _log_start(self) -> None:
        if self.config.lora is not None and self.config.lora.path is not None:
            self._write_weights(START)
        self._save_samples()
        self.progress.validation = self._validate()
        self.progress.base = self.progress.validation
        if self.progress.base:
            self.log.row(0, self.progress.base)

    def _after_update(self, metrics: dict[str, float]) -> None:
        if not metrics["skipped_updates"]:
            self.progress.skipped = 0
        self.progress.update += 1
        self.progress.validation = self._validate()
        self.log.row(self.progress.update, {**metrics, **self.progress.validation})
        update = self.progress.update
        due = self._sample_clock.is_due(update - 1, update)
        if due and update != self.config.train.num_updates:
            self._save_samples()

    def _after_rollout(self) -> None:
        """A checkpoint is due: by its clock, or because this is the best so far."""
        train, update = self.config.train, self.progress.update
        best = self.progress.note_best() and train.saves
        due = self._save_clock.is_due(update - train.inner_updates, update)
        if (due or best) and update != train.num_updates:
            self._save_checkpoint()

    def _is_ended_by_alarm(self) -> bool:
        """Says what has raised an alarm, and ends with the best weights if so configured.

        Raises:
            RewardError: if the run shall stop.
        """
        why, self._alarm = self._alarm, ""
        how, update = self.config.faults.hacking, self.progress.update
        if why and how == "stop" and update < self.config.train.num_updates:
            raise everywhere(
                RewardError(f"{why}; change the recipe, or set faults.hacking to warn")
            )
        if why and how == "best":
            if self._saved != update:
                self._save_checkpoint()  # to go on from, all the same
            self.store.wait()
            if self.ranks.is_first:
                end_with_best(self.log, update, why)
        elif why and self.ranks.is_first:
            logger.warning("update %d: %s", update, why)
        return bool(why) and how == "best"

    def _finish(self) -> None:
        self._write_weights(WEIGHTS)
        self._save_samples()
        if self._saved != self.progress.update and self.config.train.saves:
            self._save_checkpoint()
        self.store.wait()
        self.log.finish(self.progress.update)

    def _write_weights(self, name: str) -> None:
        with self._averaged(), gathered(self.generator.transformer, here=self.ranks.is_first):
            if self.ranks.is_first:
                replace_folder(self.log.folder / name, self.generator.save_weights)

    def _validate(self) -> dict[str, float]:
        every, last = self.config.evaluation.validate_every, self.config.train.num_updates
        update = self.progress.update
        if self.validation is None or (update % every and update != last):
            return {}
        with self.log.timed("validation"):
            with self._averaged():
                images = self.validation.sample()
            metrics = self.validation.metrics(images, is_base=update == 0)
            alarm = self.validation.alarm
        metrics, alarm.state = self.ranks.broadcast([metrics, alarm.state])
        self._alarm = alarm.raised()
        return metrics

    def _save_samples(self) -> None:
        self._sample_clock.restart()
        if not self._takes_part:
            return
        with self.log.timed("samples"), self._averaged():
            now = self.samples.sample()
        if self.ranks.is_first:
            file = self.log.folder / SAMPLES / f"{self.progress.update:06d}.png"
            self.samples.save(file, now)

    def _save_checkpoint(self) -> None:
        with self.log.timed("checkpoint"):
            first = self.ranks.is_first
            tensors = self.state.tensors(keep=first) if self._takes_part else {}
            with self._averaged(), gathered(self.generator.transformer, here=first):
                if first:
                    self._write_checkpoint(tensors)
        self._saved = self.progress.update
        self._save_clock.restart()

    def _write_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        self.log.sync()
        record = {
            "progress": asdict(self.progress),
            "measured": asdict(self.loop.measured),
            "origins": origins(self.config),
            "score": self.progress.score(),
            "rewards": self.rewards.metrics(),
            "evaluators": self.validation.evaluators.metrics() if self.validation else {},
            "factors": self.loop.factors,
            "hacking": self.validation.alarm.state if self.validation else {},
            "base_scores": self.validation.gains.base if self.validation else {},
            "environment": describe_environment(self.generator.device),
        }
        self.store.save(self.progress.update, tensors, record, self.generator.save_weights)

    def _rescue(self, is_everywhere: bool) -> str:
        """Saves what can be saved; returns how to go on. What fails here must not hide why."""
        resume = f"`cgrpo resume {shlex.quote(str(self.log.folder))}` goes on"
        if not self._takes_part:
            return resume
        update = self.progress.update
        # A sharded model needs the parts of the others, who are not there if this one alone fails.
        is_possible = is_everywhere or not self.loop.is_sharded
        try:
            if is_possible and not self.loop.mid_rollout and update and self._saved != update:
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

    def _skip(self, batch: Batch, conditioning: Conditioning, is_pinned: bool) -> None:
        """Lets an update whose gradient is not finite pass without a step, and says why.

        Raises:
            CheckpointError: if it is one too many in a row.
        """
        self.progress.skipped += 1
        update, size = self.progress.update + 1, self.loop.micro_batch_size
        report = diagnose(self.loop.policy, batch, conditioning, self.generator.transformer, size)
        logger.warning("update %d is skipped: %s", update, report)
        if self.progress.skipped < self.config.faults.max_skipped_updates:
            return
        rank = "" if self.ranks.world_size == 1 else f"-rank{self.ranks.rank}"
        folder = self.log.folder / FAILURES / f"{update:06d}{rank}"
        # All have the same weights, or parts of them: one copy does for the dumps of all.
        state = self.state.tensors(keep=self.ranks.is_first) if self._takes_part else {}
        config = self.loop.sizes.config_of(self.loop.policy)
        dump_failure(folder, config, report, batch, conditioning, state, is_pinned)
        raise everywhere(
            CheckpointError(
                f"{self.progress.skipped} updates in a row had no finite gradient: {report}; "
                f"`cgrpo replay {shlex.quote(str(folder))}` shows it again"
            )
        )

    @property
    def _takes_part(self) -> bool:
        """In what the first process needs; others have to if they hold parts of the weights."""
        return self.ranks.is_first or self.loop.is_sharded

    def _averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are those that are saved: their average, if there is one."""
        return nullcontext() if self.loop.ema is None else self.loop.ema.applied()
