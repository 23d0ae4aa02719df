"""The loop: examples -> rollout -> rewards -> advantages -> policy loss -> update -> log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from customized_grpo.checkpoint import Ema
from customized_grpo.config import RunConfig, TrainConfig, explain_batch
from customized_grpo.credit import assign_credit, objective_weights, share_statistics
from customized_grpo.data.base import DataSource
from customized_grpo.errors import ConfigError, RewardError, within
from customized_grpo.files import replace_folder
from customized_grpo.generators.base import Conditioning, Generator
from customized_grpo.generators.cache import CachedEncoder
from customized_grpo.generators.lora import attach_lora, trust_autocast
from customized_grpo.policy_loss import accumulate_gradient, policy_batch
from customized_grpo.report.grid import save_grid
from customized_grpo.rewards.attributes import AttributeClassifier
from customized_grpo.rewards.base import RewardSet
from customized_grpo.rewards.scoring_queue import ScoringQueue
from customized_grpo.rollout import FixedSampler, collect_rollout, make_policy, pick_device
from customized_grpo.runlog import RunLog, run_folder
from customized_grpo.types import Advantages, Example, RewardScores, Rollout

logger = logging.getLogger("customized_grpo")

WEIGHTS = "weights"
_NUM_SAMPLES = 6  # rows of a sample grid


def train(config: RunConfig) -> Path:
    """Trains as the config says and returns the run folder.

    Everything is loaded and checked before the folder is created: a mistake leaves nothing behind.

    Raises:
        CustomizedGRPOError: with one line that names the field and the fix.
    """
    folder = run_folder(config)
    device = pick_device(config.device)
    data, generator = build_world(config, device)
    rewards = RewardSet(config.rewards, device)
    evaluators = RewardSet(config.evaluators, device, "evaluators")
    if config.evaluation.classifier is not None:  # used after training; a mistake shows before
        AttributeClassifier.load(config.evaluation.classifier, device)
    torch.manual_seed(config.seed)
    make_trainable(generator, config)
    samples = SampleGrid(generator, config, data.held_out(_NUM_SAMPLES))
    every = config.evaluation.validate_every
    validation = Validation(generator, config, data, rewards, evaluators) if every else None
    log = RunLog(folder, config, device)
    logger.info(explain_batch(config))
    Trainer(config, data, generator, rewards, samples, validation, log).run()
    return folder


def build_world(config: RunConfig, device: torch.device) -> tuple[DataSource, Generator]:
    """Loads data source and generator; their errors name the section of the config."""
    with within("data"):
        data: DataSource = config.data.build(config.seed)
    with within("generator"):
        generator: Generator = config.generator.build(device)
    for example in data.listed():
        generator.check(example)
    return data, generator


def make_trainable(generator: Generator, config: RunConfig) -> None:
    """Adds LoRA, or unfreezes the transformer where the config has none."""
    if config.lora is not None:
        attach_lora(generator.transformer, config.lora, generator.lora_targets)
        if config.mixed_precision == "bf16":
            trust_autocast(generator.transformer)
    elif getattr(generator.transformer, "is_quantized", False):
        raise ConfigError("lora: must not be null with generator.quantization, got null; add lora")
    else:
        generator.transformer.requires_grad_(True).float()
    if config.compile:
        transformer: Any = generator.transformer
        if not getattr(transformer, "_repeated_blocks", None):
            raise ConfigError(
                f"compile must be false for {type(transformer).__name__}, got true; diffusers "
                "names no repeated blocks in it"
            )
        transformer.compile_repeated_blocks(dynamic=False)


def make_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' with its state in 8 bits (arXiv:2110.02861).

    Raises:
        ConfigError: if that is asked for and not installed.
    """
    optimizer: Any = torch.optim.AdamW
    if config.optimizer == "adamw-8bit":
        try:
            from bitsandbytes.optim import AdamW8bit as optimizer
        except ImportError as error:
            raise ConfigError(
                f"train.optimizer: 'adamw-8bit' needs the extra package ({error}); "
                "pip install 'customized-grpo[bitsandbytes]'"
            ) from error
    return optimizer(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )


class SampleGrid:
    """Pictures of a few held-out examples in the course of training."""

    def __init__(self, generator: Generator, config: RunConfig, examples: list[Example]) -> None:
        self._sampler = FixedSampler(generator, config, examples)
        self._examples = examples
        self._base = self._sample()

    @torch.compiler.set_stance("force_eager")  # too few pictures to compile for
    def _sample(self) -> Tensor:
        return self._sampler()

    def save(self, path: Path) -> None:
        """Reference | prompt | base | now."""
        path.parent.mkdir(exist_ok=True)
        save_grid(path, self._examples, {"base": self._base, "now": self._sample()})


class Validation:
    """Scores of the same validation examples in the course of training, by every model there is."""

    def __init__(
        self,
        generator: Generator,
        config: RunConfig,
        data: DataSource,
        rewards: RewardSet,
        evaluators: RewardSet,
    ) -> None:
        with within("data"):
            examples = data.validation(config.evaluation.num_validation)
        self._sample = FixedSampler(generator, config, examples)
        self._examples = examples
        self._sets = {"validation": evaluators, "validation/reward": rewards}

    def metrics(self) -> dict[str, float]:
        """Means ``validation/<evaluator>`` and ``validation/reward/<reward>`` as of now, and
        ``evaluator/<evaluator>/<number>`` where one has numbers of its own."""
        images = self._sample()
        means: dict[str, float] = {}
        for prefix, models in self._sets.items():
            scores = models.score(images, self._examples)
            for error in scores.errors:
                logger.warning("validation: %s", error)
            values = scores.scores.nanmean(0).tolist()
            means |= {f"{prefix}/{n}": v for n, v in zip(scores.names, values, strict=True)}
        counts = self._sets["validation"].metrics()
        return means | {f"evaluator/{name}": value for name, value in counts.items()}


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
    ) -> None:
        self.config, self.data, self.generator = config, data, generator
        self.rewards, self.samples, self.log = rewards, samples, log
        self.validation = validation
        cached = CachedEncoder(generator, config.generator, config.cache)
        self.encode = cached if data.listed() else generator.encode
        self.policy = make_policy(generator, config)
        self.parameters = [p for p in generator.transformer.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, config.train)
        decay = config.train.ema_decay
        self.ema = None if decay is None else Ema(generator.transformer, decay)
        self.update = 0

    def run(self) -> None:
        """All rollouts and their updates."""
        train = self.config.train
        self._log_start()
        with self.log.progress():
            for rollout in range(train.num_updates // train.inner_updates):
                self._iterate(rollout)
        self.save()
        self._save_samples()
        self.log.finish(self.update)

    def _log_start(self) -> None:
        sigmas, objectives = self.policy.sigmas, self.rewards.objectives
        weights = objective_weights(sigmas[:-1], self.config.advantage, objectives)
        self.log.schedule(sigmas, weights, objectives)
        self._save_samples()
        if self.validation is not None:
            self.log.row(0, self._validate())

    def _iterate(self, number: int) -> None:
        config, log = self.config, self.log
        random = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
        with log.timed("data"):
            prompts = self.data.training(number, config.rollout.prompts_per_rollout)
            per_prompt = self.encode(prompts)
        rollout, scores = self._sample_and_score(prompts, per_prompt, random)
        for error in scores.errors:
            logger.warning("rollout %d: %s", number, error)
        advantages = assign_credit(
            scores.scores,
            rollout.group_ids,
            rollout.sigmas,
            config.advantage,
            config.rewards,
            self.rewards.objectives,
        )
        if not advantages.valid.any():
            raise RewardError(
                f"rewards: no image of rollout {number} could be scored; "
                + ("; ".join(scores.errors) or "all scores are NaN")
            )
        log.advantages(number, advantages.per_objective, self.rewards.objectives)
        metrics = rollout_metrics(scores, advantages, rollout.group_ids, self.rewards.objectives)
        metrics |= {f"reward/{name}": value for name, value in self.rewards.metrics().items()}
        conditioning = per_prompt.take(rollout.group_ids)
        for inner, groups in enumerate(self._split_groups()):
            samples = torch.isin(rollout.group_ids, groups.to(rollout.group_ids.device))
            batch = policy_batch(rollout, advantages, samples.nonzero()[:, 0])
            with log.timed("update"):
                stats = self._optimize(batch, conditioning, first=inner == 0)
            self.update += 1
            log.row(self.update, {**metrics, **stats, **self._validate()})
            metrics = {}
            self._after_update()

    def _sample_and_score(
        self, prompts: Sequence[Example], per_prompt: Conditioning, random: torch.Generator
    ) -> tuple[Rollout, RewardScores]:
        """Scoring goes on beside sampling; ``seconds/reward`` is what it takes beyond it."""
        config, log = self.config, self.log
        with ScoringQueue(self.rewards.score) as queue:
            with log.timed("rollout"):
                rollout = collect_rollout(
                    self.policy,
                    per_prompt,
                    config.rollout,
                    random,
                    keep_means=config.loss.ratio_norm,
                    on_images=lambda images, groups: queue.put(
                        images, [prompts[i] for i in groups.tolist()]
                    ),
                )
            with log.timed("reward"):
                return rollout, queue.result()

    def _validate(self) -> dict[str, float]:
        every, last = self.config.evaluation.validate_every, self.config.train.num_updates
        if self.validation is None or (self.update % every and self.update != last):
            return {}
        with self.log.timed("validation"), self._averaged():
            return self.validation.metrics()

    def _split_groups(self) -> tuple[Tensor, ...]:
        count = self.config.rollout.prompts_per_rollout
        return torch.arange(count).split(count // self.config.train.inner_updates)

    def _optimize(self, batch, conditioning, *, first: bool) -> dict[str, float]:
        train, loss = self.config.train, self.config.loss
        self.optimizer.zero_grad(set_to_none=True)
        stats = accumulate_gradient(
            self.policy,
            batch,
            conditioning,
            loss,
            pinned=loss.pin_ratio and first,
            micro_batch_size=train.micro_batch_size,
        )
        if not first:  # off policy by then: the ratio itself is the number to look at
            stats.pop("mismatch")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, train.max_grad_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        return {**stats, "grad_norm": norm.item()}

    def _after_update(self) -> None:
        train, last = self.config.train, self.update == self.config.train.num_updates
        if train.sample_every and self.update % train.sample_every == 0 and not last:
            self._save_samples()
        if train.save_every and self.update % train.save_every == 0 and not last:
            self.save()

    def save(self) -> None:
        """Writes the trained weights (their average, if there is one) in the family's format."""
        with self._averaged():
            replace_folder(self.log.folder / WEIGHTS, self.generator.save_weights)

    def _save_samples(self) -> None:
        with self._averaged():
            self.samples.save(self.log.folder / "samples" / f"{self.update:06d}.png")

    def _averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are those that are saved: their average, if there is one."""
        return nullcontext() if self.ema is None else self.ema.applied()


def rollout_metrics(
    scores: RewardScores, advantages: Advantages, group_ids: Tensor, objectives: Sequence[str]
) -> dict[str, float]:
    """Reward means and stds, shares of conflicted samples, groups without information."""
    metrics: dict[str, float] = {}
    for column, name in enumerate(scores.names):
        values = scores.scores[:, column]
        values = values[~values.isnan()]
        if len(values):
            metrics[f"reward/{name}/mean"] = values.mean().item()
            metrics[f"reward/{name}/std"] = values.std(correction=0).item()
    metrics |= share_statistics(advantages, objectives)
    silent = (advantages.per_objective.nan_to_num() == 0).all(1)
    groups = [silent[group_ids == group].all().item() for group in group_ids.unique()]
    metrics["zero_variance_groups"] = float(sum(groups))
    metrics["invalid_samples"] = float((~advantages.valid).sum().item())
    return metrics
