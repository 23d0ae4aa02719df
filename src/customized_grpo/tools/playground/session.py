"""The model work behind the playground: a queue of requests, drawn one at a time.

Knows nothing of the page. Its methods may be called from any thread.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from customized_grpo.config import RunConfig
from customized_grpo.devices import memory_named
from customized_grpo.errors import CheckpointError, CustomizedGRPOError, ResourceError
from customized_grpo.evaluation.results import BASE
from customized_grpo.generators.base import Generator
from customized_grpo.generators.cache import CachedEncoder
from customized_grpo.generators.lora import LORA_FILE, detach_lora, set_strength
from customized_grpo.generators.pipeline import PipelineGenerator
from customized_grpo.pictures import to_pil
from customized_grpo.rewards.base import RewardSet
from customized_grpo.tools.generate import LESS_MEMORY, TUNED, find_model, num_steps, seeded_sampler
from customized_grpo.tools.playground.request import Drawn, Outcome, Request, Trained, list_trained
from customized_grpo.training.build import build_generator, load_trained
from customized_grpo.training.rollout import pick_device
from customized_grpo.types import Example

logger = logging.getLogger("customized_grpo")

MOST_JOBS = 16
_KEPT_PICTURES = 64
_SMALLER = f"generator.height and generator.width, or {LESS_MEMORY}"


class Cancelled(Exception):
    """The request was called off."""


class Job:
    """A request on its way."""

    def __init__(self, request: Request, owner: str, total: int) -> None:
        self.request, self.owner = request, owner
        self.stage = "waiting"
        """What is being done."""
        self.done, self.total = 0, total
        """Denoising steps."""
        self._cancelled, self._ended = threading.Event(), threading.Event()
        self._future: Future[Outcome] = Future()

    def start(
        self,
        worker: ThreadPoolExecutor,
        work: Callable[[Job], Outcome],
        on_end: Callable[[Job], None],
    ) -> None:
        """Puts it into the worker's queue; ``on_end`` is called from any thread."""

        def end(_: Future[Outcome]) -> None:
            on_end(self)
            self._ended.set()

        self._future = worker.submit(work, self)
        self._future.add_done_callback(end)

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it has ended, at most so many seconds from now."""
        return self._ended.wait(seconds)

    def result(self) -> Outcome:
        """What came out, when it has ended.

        Raises:
            Cancelled: if it was called off.
            CustomizedGRPOError: if it could not be done.
        """
        if self._future.cancelled():
            raise Cancelled
        return self._future.result()

    def cancel(self) -> None:
        """Ends it before its next denoising step, or at once if it is waiting."""
        self._cancelled.set()
        self._future.cancel()

    def enter(self, stage: str) -> None:
        """Notes what is being done from now on.

        Raises:
            Cancelled: if it was called off.
        """
        if self._cancelled.is_set():
            raise Cancelled
        self.stage = stage


class Session:
    """A generator, its trained weights, the run's reward models, and the queue in front of them.

    Base and LoRA share a transformer. Where all of its weights were trained, there is a second one
    beside the base.

    Raises:
        CheckpointError: if TARGET is a folder without weights.
        ConfigError: if generator or rewards cannot be built.
        RewardError: if a remote one does not answer.
    """

    def __init__(self, target: Path, lora: Path | None = None) -> None:
        self._target, self._model = target, find_model(target, lora)
        config, weights, trained = self._model.config, self._model.weights, self.trained()
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
        self._loaded: Trained | None = None
        in_memory = dataclasses.replace(config.cache, folder=None)  # uploads are not to stay
        self._encode = CachedEncoder(self._base, config.generator, in_memory)
        self._rewards = RewardSet(config.rewards, device)
        self._kept: OrderedDict[Hashable, Drawn] = OrderedDict()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="playground")
        self._jobs: list[Job] = []
        self._lock = threading.RLock()

    @property
    def config(self) -> RunConfig:
        """Of the run."""
        return self._model.config

    @property
    def objectives(self) -> Mapping[str, str]:
        """Reward -> objective, in the order of the config."""
        return {config.label: config.objective for config in self.config.rewards}

    @property
    def receivers(self) -> Mapping[str, tuple[str, ...]]:
        """Reward -> hosts that pictures and prompts are sent to; of those that send any."""
        hosts = {
            config.label: tuple(dict.fromkeys(host.name for host in config.hosts()))
            for config in self.config.rewards
        }
        return {reward: found for reward, found in hosts.items() if found}

    @property
    def wants_subject(self) -> bool:
        """Whether a reward looks for the subject by its name."""
        return any(getattr(config, "segmenter", None) for config in self.config.rewards)

    def trained(self) -> tuple[Trained, ...]:
        """The weights there are now; a run that is under way writes more, and deletes old ones."""
        return list_trained(self._target, self._model)

    def examples(self, count: int) -> list[Example]:
        """Held-out examples of the run's data; none where the data are not on this machine."""
        try:
            return self.config.data.build(self.config.seed).held_out(count)
        except (CustomizedGRPOError, OSError) as error:
            logger.warning("no examples on the page: %s", error)
            return []

    def submit(self, request: Request, owner: str = "") -> Job:
        """Puts a request into the queue.

        Raises:
            DataError: if the generator cannot take the reference.
            ResourceError: if the queue is full.
        """
        self._base.check(request.example)
        pictures = 1 if request.trained is None else 2
        with self._lock:
            if len(self._jobs) >= MOST_JOBS:
                raise ResourceError(
                    f"queue: must have at most {MOST_JOBS} requests, it is full; try again later"
                )
            job = Job(request, owner, pictures * num_steps(self.config))
            self._jobs.append(job)
            job.start(self._worker, self._work, self._remove)
        return job

    def jobs(self, owner: str | None = None) -> list[Job]:
        """Those that have not ended, the next first; of one owner, or all."""
        with self._lock:
            return [job for job in self._jobs if owner in (None, job.owner)]

    def ahead_of(self, job: Job) -> int:
        """How many requests are drawn before it, the one being drawn included."""
        jobs = self.jobs()
        return jobs.index(job) if job in jobs else 0

    def cancel(self, owner: str | None = None) -> int:
        """Calls off what one owner, or anyone, has in the queue; returns how many those were."""
        jobs = self.jobs(owner)
        for job in reversed(jobs):  # so that none of them begins when the first one ends
            job.cancel()
        return len(jobs)

    def close(self) -> None:
        """Calls everything off and waits for what was being drawn."""
        self.cancel()
        self._worker.shutdown()

    def _remove(self, job: Job) -> None:
        with self._lock:
            self._jobs.remove(job)

    @torch.no_grad()
    def _work(self, job: Job) -> Outcome:
        request = job.request
        with memory_named(_SMALLER):
            base = self._drawn(job, None)
            if request.trained is None:
                return Outcome(request=request, base=base)
            tuned = self._drawn(job, request.trained)
        change = self._change(base.scores, tuned.scores)
        return Outcome(request=request, base=base, tuned=tuned, change=change)

    def _drawn(self, job: Job, trained: Trained | None) -> Drawn:
        """By the base or by trained weights; what was drawn before is not drawn again."""
        request = job.request
        strength = None if trained is None else request.strength
        key = (request.example.id, request.seed, trained, strength)
        goal = job.done + num_steps(self.config)
        drawn = self._kept.get(key) or self._draw(job, trained)
        job.done = goal
        if not drawn.errors:  # a reward that failed may be there again the next time
            self._kept[key] = drawn
            self._kept.move_to_end(key)
        if len(self._kept) > _KEPT_PICTURES:
            self._kept.popitem(last=False)
        return drawn

    def _draw(self, job: Job, trained: Trained | None) -> Drawn:
        request, name = job.request, BASE if trained is None else TUNED
        generator = self._base if trained is None else self._tuned
        if trained is not None:
            job.enter("loading weights")
            self._load(trained, request.strength)
        job.enter(f"{name}: reading reference and prompt")
        sampler = seeded_sampler(
            generator, self.config, [request.example], [request.seed], self._encode
        )

        def on_step() -> None:
            job.enter(f"{name}: denoising")
            job.done += 1

        with self._base.base_policy() if trained is None else nullcontext():
            (image,) = sampler(on_step)
        job.enter(f"{name}: scoring")
        scores, errors = self._score(image, request.example)
        return Drawn(image=to_pil(image), scores=scores, errors=errors)

    def _load(self, trained: Trained, strength: float) -> None:
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

    def _change(self, base: Mapping[str, float], tuned: Mapping[str, float]) -> dict[str, float]:
        """Objective -> mean of its rewards' changes by their weights."""
        changes = {}
        for objective in self._rewards.objectives:
            rewards = [c for c in self.config.rewards if c.objective == objective]
            gains = [c.weight * (tuned[c.label] - base[c.label]) for c in rewards]
            changes[objective] = sum(gains) / sum(c.weight for c in rewards)
        return changes


def _beside(generator: Generator, config: RunConfig) -> Generator:
    """The same with a transformer of its own; a stock pipeline's other models are shared."""
    if not isinstance(generator, PipelineGenerator):
        return build_generator(config, generator.device)
    parts = generator.pipeline.components
    shared = {id(part): part for name, part in parts.items() if name != "transformer"}
    return copy.deepcopy(generator, shared)
