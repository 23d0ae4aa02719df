"""What shows how a run goes: sample pictures, validation scores, numbers of a rollout."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from customized_grpo.buckets import layout
from customized_grpo.config import RunConfig
from customized_grpo.data.base import DataSource
from customized_grpo.errors import ConfigError, within
from customized_grpo.generators.base import Generator
from customized_grpo.ops import group_normalize
from customized_grpo.pictures import save_grid
from customized_grpo.rewards.attributes import AttributeClassifier
from customized_grpo.rewards.base import RewardSet
from customized_grpo.rewards.truth import SHARES, Truth
from customized_grpo.runs.ranks import ALONE, Ranks
from customized_grpo.runs.sharding import is_sharded
from customized_grpo.training.advantages import share_statistics
from customized_grpo.training.gains import Gains
from customized_grpo.training.hacking import COPY_GAPS, HackingAlarm
from customized_grpo.training.sampling import FixedSampler, as_evaluated
from customized_grpo.training.scoring import gather_scores
from customized_grpo.types import Advantages, Example, RewardScores

logger = logging.getLogger("customized_grpo")

NUM_SAMPLES = 6  # rows of a sample grid


class SampleGrid:
    """Pictures of a few held-out examples in the course of training."""

    def __init__(self, generator: Generator, config: RunConfig, examples: list[Example]) -> None:
        self._sampler = FixedSampler(generator, config, examples)
        self._examples = examples
        is_new = config.lora is None or config.lora.path is None
        self._first, self._name = self.sample(), "base" if is_new else "start"

    @torch.compiler.set_stance("force_eager")  # too few pictures to compile for
    def sample(self) -> Tensor:
        """Pictures ``[B, 3, H, W]`` by the generator as it is now."""
        return self._sampler()

    def save(self, path: Path, now: Tensor) -> None:
        """Reference | prompt | base, or the LoRA that the run goes on from | now."""
        path.parent.mkdir(exist_ok=True)
        save_grid(path, self._examples, {self._name: self._first, "now": now})


class Validation:
    """Scores of the same validation examples in the course of training, by every model there is.

    Every process samples and scores its share of the examples. A pass through a sharded model is a
    meeting of all: so that they come equally often, some examples are then computed twice.
    """

    def __init__(
        self,
        generator: Generator,
        config: RunConfig,
        data: DataSource,
        rewards: RewardSet,
        evaluators: RewardSet,
        classifier: AttributeClassifier | None,
        ranks: Ranks = ALONE,
    ) -> None:
        with within("data"):
            examples = data.validation(config.evaluation.num_validation)
        if len(examples) < ranks.world_size:
            is_all = len(examples) < config.evaluation.num_validation
            raise ConfigError(
                "evaluation.num_validation: must be at least one for each of the "
                f"{ranks.world_size} processes, got {len(examples)}; "
                f"{'the data have no more for validation' if is_all else 'raise it'}"
            )
        self._num_examples, self._ranks = len(examples), ranks
        self._shares = _shares(examples, ranks.world_size, is_sharded(generator.transformer))
        mine = self._shares[ranks.rank]
        rng = torch.Generator().manual_seed(config.evaluation.seed)
        noise = as_evaluated(generator, config).noise(len(examples), rng)
        noise = noise[mine.to(generator.device)]
        self._examples = [examples[row] for row in mine.tolist()]
        self.sample = FixedSampler(generator, config, self._examples, noise=noise)
        """Pictures ``[b, 3, H, W]`` of this process's share by the generator as it is now."""
        self.evaluators = evaluators
        self._sets = {"validation": evaluators, "validation/reward": rewards}
        encoder, device = evaluators.embedder("identity"), generator.device
        self.alarm, self.gains = HackingAlarm(config), Gains(config)
        self._truth = Truth(self._examples, data, encoder, classifier, device)
        limits = ranks.all_gather_object(self._truth.copy_limit)
        known = [limit for limit in limits if limit is not None]
        self._truth.copy_limit = max(known) if len(known) == len(limits) else None

    def metrics(self, images: Tensor, *, is_base: bool) -> dict[str, float]:
        """Means over all processes' examples, from this one's pictures: ``validation/<evaluator>``,
        ``validation/reward/<reward>`` and, where they are known, ``copy_gap/validation`` and the
        shares of right pictures ``validation/share/<name>``; and
        ``evaluator/<evaluator>/<number>`` where one has numbers of its own; ``hacking/<evaluator>``
        and ``copying/<evaluator>`` as the alarm has them, and ``gain/<objective>`` since
        ``is_base``, before the first update."""
        shares, columns = self._share_columns(images), dict[str, Tensor]()
        means = {name: column.mean().item() for name, column in shares.items()}
        for prefix, models in self._sets.items():
            own = models.score(images, self._examples)
            for error in own.errors:
                logger.warning("validation: %s", error)
            scores = gather_scores(own, self._ranks, self._shares)
            values = scores.scores[: self._num_examples].unbind(1)
            found = {f"{prefix}/{n}": v for n, v in zip(scores.names, values, strict=True)}
            columns |= found
            means |= {name: column.nanmean().item() for name, column in found.items()}
            gap = columns[COPY_GAPS[prefix]] = scores.copy_gap[: self._num_examples]
            means = known_mean("copy_gap/validation", gap) | means  # the evaluators' first
        counts = self.evaluators.metrics()
        means |= {f"evaluator/{name}": value for name, value in counts.items()}
        return means | self.alarm.look(columns) | self.gains.look(columns | shares, is_base=is_base)

    def _share_columns(self, images: Tensor) -> dict[str, Tensor]:
        known = {n: column for n, column in self._truth(images).items() if n in SHARES}
        names = self._ranks.all_gather_object(list(known))  # one's examples may know less
        known = {n: column for n, column in known.items() if all(n in some for some in names)}
        if not known:
            return {}
        own = torch.stack(list(known.values()), 1)
        columns = self._ranks.all_gather(own, self._shares)[: self._num_examples].unbind(1)
        return {f"validation/share/{name}": c for name, c in zip(known, columns, strict=True)}


def _shares(examples: Sequence[Example], world_size: int, evenly: bool) -> list[Tensor]:
    """Rows of every process, those of a layout together, as they are sampled together.

    ``evenly``: equally many of each layout for every process, by repeating the first one's row.
    """
    rows: dict[object, list[int]] = defaultdict(list)
    for row, example in enumerate(examples):
        rows[layout(r.shape[1:] for r in example.references)].append(row)
    dealt: list[int] = []
    for some in rows.values():
        dealt += some + some[:1] * (-len(some) % world_size if evenly else 0)
    return [torch.tensor(dealt[rank::world_size]) for rank in range(world_size)]


def known_mean(name: str, values: Tensor) -> dict[str, float]:
    """The mean of what is not NaN under its name; {} if nothing is known."""
    known = values[~values.isnan()]
    return {name: known.mean().item()} if len(known) else {}


def rollout_metrics(
    scores: RewardScores, advantages: Advantages, group_ids: Tensor, objectives: Sequence[str]
) -> dict[str, float]:
    """Reward means and stds, copying, shares of conflicted samples, silent groups."""
    metrics: dict[str, float] = {}
    for column, name in enumerate(scores.names):
        values = scores.scores[:, column]
        values = values[~values.isnan()]
        if len(values):
            metrics[f"reward/{name}/mean"] = values.mean().item()
            metrics[f"reward/{name}/std"] = values.std(correction=0).item()
    metrics |= known_mean("copy_gap", scores.copy_gap) | share_statistics(advantages, objectives)
    metrics |= what_copying_pays(scores.copy_gap, advantages, group_ids, objectives)
    silent = (advantages.per_objective.nan_to_num() == 0).all(1)
    groups = [silent[group_ids == group].all().item() for group in group_ids.unique()]
    metrics["zero_variance_groups"] = float(sum(groups))
    metrics["invalid_samples"] = float((~advantages.valid).sum().item())
    return metrics


def what_copying_pays(
    gap: Tensor, advantages: Advantages, group_ids: Tensor, objectives: Sequence[str]
) -> dict[str, float]:
    """Correlation of the copy gap ``[B]`` with each objective's advantage within the groups.

    Above 0, a sample that copies more than others of its group is pushed up by this objective.
    """
    more = group_normalize(gap[:, None], group_ids)
    pays = more * advantages.per_objective
    names = (f"copying_pays/{name}" for name in objectives)
    columns = zip(names, pays.unbind(1), strict=True)
    return {key: value for name, pay in columns for key, value in known_mean(name, pay).items()}
