"""The model work behind the playground. Knows nothing of the page."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import math
import statistics
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from customized_grpo.config import RunConfig
from customized_grpo.config.names import BASE
from customized_grpo.devices import memory_named, pick_device
from customized_grpo.errors import CheckpointError, CustomizedGRPOError
from customized_grpo.files import LORA_FILE
from customized_grpo.generators.base import Generator
from customized_grpo.generators.cache import CachedEncoder
from customized_grpo.generators.lora import detach_lora, set_strength
from customized_grpo.generators.pipeline import PipelineGenerator
from customized_grpo.pictures import to_pil
from customized_grpo.rewards.base import RewardSet
from customized_grpo.runs.files import MetricsReader
from customized_grpo.tools.generate import (
    LESS_MEMORY,
    TUNED,
    num_steps,
    open_target,
    seeded_sampler,
)
from customized_grpo.tools.playground.request import (
    Comparison,
    Drawn,
    DrawRequest,
    TrainedWeights,
    list_trained,
)
from customized_grpo.training.build import build_generator, load_trained
from customized_grpo.types import Example

logger = logging.getLogger("customized_grpo")

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, and a picture's denoising steps: those done, and all."""

_KEPT_PICTURES = 64
_SMALLER = f"generator.height and generator.width, or {LESS_MEMORY}"


class Session:
    """A generator, its trained weights, and the run's reward models.

    Base and LoRA share a transformer. Where all of its weights were trained, there is a second one
    beside the base.

    Raises:
        CheckpointError: if TARGET is a folder without weights.
        ConfigError: if generator or rewards cannot be built.
        RewardError: if a remote one does not answer.
    """

    def __init__(self, target: Path, lora: Path | None = None) -> None:
        self._target = open_target(target, lora)
        self._run = target if target.is_dir() else None
        config, weights, trained = self.config, self._target.weights, self.trained()
        if weights is not None and not trained:
            raise CheckpointError(
                f"{weights}: must hold {LORA_FILE} or a transformer, neither is there; restore it"
            )
        self.is_lora = bool(trained) and trained[-1].is_lora
        """Whether the weights are a LoRA, whose strength can be chosen."""
        device = pick_device(config.device)
        self._base: Generator = build_generator(config, device)
        is_full = bool(trained) and not self.is_lora
        self._tuned = _beside(self._base, config) if is_full else self._base
        self._loaded: TrainedWeights | None = None
        in_memory = dataclasses.replace(config.cache, folder=None)  # uploads are not to stay
        self._encode = CachedEncoder(self._base, config.generator, in_memory)
        self._rewards = RewardSet(config.pointwise_rewards, device)
        spreads = _spreads(self._run, self.objectives)
        self._spread = self._mean(spreads) if spreads else {}
        self._kept: dict[Hashable, Drawn] = {}

    @property
    def config(self) -> RunConfig:
        """The config of TARGET."""
        return self._target.config

    @property
    def objectives(self) -> Mapping[str, str]:
        """Reward -> objective, in the order of the config; those that score groups are left out."""
        return {config.label: config.objective for config in self.config.pointwise_rewards}

    @property
    def receivers(self) -> Mapping[str, tuple[str, ...]]:
        """Reward -> hosts that pictures and prompts are sent to; of those that send any."""
        hosts = {
            config.label: tuple(dict.fromkeys(host.name for host in config.hosts()))
            for config in self.config.pointwise_rewards
        }
        return {reward: found for reward, found in hosts.items() if found}

    @property
    def wants_subject(self) -> bool:
        """Whether a reward looks for the subject by its name."""
        return any(getattr(config, "segmenter", None) for config in self.config.pointwise_rewards)

    def trained(self) -> tuple[TrainedWeights, ...]:
        """The weights there are now; a run that is under way writes more, and deletes old ones."""
        return list_trained(self._run, self._target)

    def examples(self, count: int) -> list[Example]:
        """Held-out examples of the run's data; none where the data are not on this machine."""
        try:
            return self.config.data.build(self.config.seed).held_out(count)
        except (CustomizedGRPOError, OSError) as error:
            logger.warning("no examples on the page: %s", error)
            return []

    def draw(self, request: DrawRequest, on_progress: OnProgress) -> Comparison:
        """Draws what is asked for; one request at a time.

        Args:
            request: what to draw.
            on_progress: is called before every step; what it raises ends the work.

        Raises:
            CustomizedGRPOError: if it cannot be done.
        """
        self._base.check(request.example)
        with torch.no_grad(), memory_named(_SMALLER):
            base = self._drawn(request, None, on_progress)
            if request.trained is None:
                return Comparison(request=request, base=base)
            tuned = self._drawn(request, request.trained, on_progress)
        return Comparison(
            request=request,
            base=base,
            tuned=tuned,
            change=self._mean({n: tuned.scores[n] - base.scores[n] for n in base.scores}),
            spread=self._spread,
        )

    def _drawn(
        self, request: DrawRequest, trained: TrainedWeights | None, on_progress: OnProgress
    ) -> Drawn:
        """A picture by the base or by trained weights; what was drawn before is not drawn again."""
        strength = None if trained is None else request.strength
        key = (request.example.id, request.seed, trained, strength)
        drawn = self._kept.get(key) or self._draw(request, trained, on_progress)
        if not drawn.errors:  # a reward that failed may be there again the next time
            self._kept[key] = drawn
        if len(self._kept) > _KEPT_PICTURES:
            del self._kept[next(iter(self._kept))]
        return drawn

    def _draw(
        self, request: DrawRequest, trained: TrainedWeights | None, on_progress: OnProgress
    ) -> Drawn:
        name, generator = (BASE, self._base) if trained is None else (TUNED, self._tuned)
        total, steps = num_steps(self.config), itertools.count()
        on_progress(f"{name}: reading weights, reference and prompt", 0, total)
        if trained is not None:
            self._load(trained, request.strength)
        sampler = seeded_sampler(
            generator, self.config, [request.example], [request.seed], self._encode
        )
        with self._base.base_policy() if trained is None else nullcontext():
            (image,) = sampler(lambda: on_progress(f"{name}: denoising", next(steps), total))
        on_progress(f"{name}: scoring", total, total)
        scores, errors = self._score(image, request.example)
        return Drawn(image=to_pil(image), scores=scores, errors=errors)

    def _load(self, trained: TrainedWeights, strength: float) -> None:
        """Puts the weights into the generator, in place of those before."""
        if trained != self._loaded:
            self._loaded = None
            detach_lora(self._tuned.transformer)
            load_trained(self._tuned, trained.folder, self.config.mixed_precision)
            self._loaded = trained
        if trained.is_lora:
            set_strength(self._tuned.transformer, strength)

    def _score(self, image: Tensor, example: Example) -> tuple[dict[str, float], tuple[str, ...]]:
        """Reward -> score, and what went wrong: a picture is shown without scores too."""
        try:
            with memory_named(_SMALLER):
                scored = self._rewards.score(image[None], [example])
        except CustomizedGRPOError as error:
            return dict.fromkeys(self._rewards.names, math.nan), (str(error),)
        return dict(zip(scored.names, scored.scores[0].tolist(), strict=True)), scored.errors

    def _mean(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Objective -> mean of its rewards' numbers by their weights."""
        means = {}
        for objective in self._rewards.objectives:
            rewards = [c for c in self.config.pointwise_rewards if c.objective == objective]
            total = sum(c.weight * numbers[c.label] for c in rewards)
            means[objective] = total / sum(c.weight for c in rewards)
        return means


def _spreads(run: Path | None, rewards: Collection[str]) -> dict[str, float]:
    """Reward -> standard deviation over the pictures of a rollout, by the run's log; {} without."""
    if run is None:
        return {}
    log = MetricsReader(run)
    log.read()
    columns = {name: [r.get(f"reward/{name}/std") for r in log.rows] for name in rewards}
    known = {name: [x for x in column if x is not None] for name, column in columns.items()}
    return {n: statistics.mean(c) for n, c in known.items()} if all(known.values()) else {}


def _beside(generator: Generator, config: RunConfig) -> Generator:
    """The same with a transformer of its own; a stock pipeline's other models are shared."""
    if not isinstance(generator, PipelineGenerator):
        return build_generator(config, generator.device)
    parts = generator.pipeline.components
    shared = {id(part): part for name, part in parts.items() if name != "transformer"}
    return copy.deepcopy(generator, shared)
