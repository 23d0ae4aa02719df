"""What shows how a run goes: sample pictures, validation scores, numbers of a rollout."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from customized_grpo.config import RunConfig
from customized_grpo.data.base import DataSource
from customized_grpo.errors import within
from customized_grpo.generators.base import Generator
from customized_grpo.pictures import save_grid
from customized_grpo.rewards.base import RewardSet
from customized_grpo.training.advantages import share_statistics
from customized_grpo.training.sampling import FixedSampler
from customized_grpo.types import Advantages, Example, RewardScores

logger = logging.getLogger("customized_grpo")

NUM_SAMPLES = 6  # rows of a sample grid


class SampleGrid:
    """Pictures of a few held-out examples in the course of training."""

    def __init__(self, generator: Generator, config: RunConfig, examples: list[Example]) -> None:
        self._sampler = FixedSampler(generator, config, examples)
        self._examples = examples
        self._base = self.sample()

    @torch.compiler.set_stance("force_eager")  # too few pictures to compile for
    def sample(self) -> Tensor:
        """Pictures ``[B, 3, H, W]`` by the generator as it is now."""
        return self._sampler()

    def save(self, path: Path, now: Tensor) -> None:
        """Reference | prompt | base | now."""
        path.parent.mkdir(exist_ok=True)
        save_grid(path, self._examples, {"base": self._base, "now": now})


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
        self.sample = FixedSampler(generator, config, examples)
        """Pictures ``[B, 3, H, W]`` by the generator as it is now."""
        self._examples = examples
        self.evaluators = evaluators
        self._sets = {"validation": evaluators, "validation/reward": rewards}

    def metrics(self, images: Tensor) -> dict[str, float]:
        """Means ``validation/<evaluator>`` and ``validation/reward/<reward>``, and
        ``evaluator/<evaluator>/<number>`` where one has numbers of its own."""
        means: dict[str, float] = {}
        for prefix, models in self._sets.items():
            scores = models.score(images, self._examples)
            for error in scores.errors:
                logger.warning("validation: %s", error)
            values = scores.scores.nanmean(0).tolist()
            means |= {f"{prefix}/{n}": v for n, v in zip(scores.names, values, strict=True)}
        counts = self.evaluators.metrics()
        return means | {f"evaluator/{name}": value for name, value in counts.items()}


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
