"""A vision-language model as the judge, behind any OpenAI-compatible chat-completions endpoint.

Plain requests on a pool of threads rather than the openai package: a reward is called from
ordinary code, the connections live as long as the run, and every try is counted against the budget.
"""

from __future__ import annotations

import base64
import io
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from customized_grpo.config import Checkpoint, Host, RewardConfig, find_checkpoints, revisions
from customized_grpo.config.limits import (
    Concurrency,
    Count,
    FilePath,
    Retries,
    Seconds,
    Side,
    VariableName,
)
from customized_grpo.errors import ConfigError, RewardError
from customized_grpo.pictures import to_pil
from customized_grpo.registry import nearest, one_of
from customized_grpo.rewards.base import distinct, score_finite
from customized_grpo.rewards.endpoints.answer_cache import AnswerCache, content_key
from customized_grpo.rewards.endpoints.answers import (
    BadAnswer,
    expected_points,
    points,
    ranking,
    rating,
)
from customized_grpo.rewards.endpoints.budget import Ledger
from customized_grpo.rewards.endpoints.http_client import (
    Backoff,
    Endpoint,
    PermanentFailure,
    TemporaryFailure,
    check_url,
    failure_lines,
    open_endpoint,
)
from customized_grpo.rewards.endpoints.judge_client import JudgeClient
from customized_grpo.rewards.endpoints.rubrics import (
    SHIPPED,
    Question,
    Rubric,
    answer_format,
    load_rubric,
    messages,
)
from customized_grpo.types import Example

logger = logging.getLogger("customized_grpo")

_TOP_LOGPROBS = 20  # the most that OpenAI and a vLLM server as it is started by default give


@dataclass(frozen=True, kw_only=True, slots=True)
class VlmJudgeConfig(RewardConfig):
    """What a vision-language model says of pictures by a rubric."""

    type: Literal["vlm-judge"] = "vlm-judge"  # pyright: ignore[reportIncompatibleVariableOverride]
    base_url: str
    """The endpoint up to its version, such as 'http://localhost:8000/v1'."""
    model: str
    """Name of the model at the endpoint."""
    criterion: FilePath
    """identity = the same subject as in the references; prompt = everything that is asked for;
    another rubric by its name, or a YAML file with one of your own."""
    aspects: tuple[str, ...] | None = None
    """The aspects of the rubric that count; null = all. Questions with none of them are not
    asked."""
    api_key_env: VariableName | None = None
    """Environment variable with the key; null = none is needed."""
    logit_weighted: bool = False
    """Expected points under the probabilities of the digits, instead of the digit: finer. The
    endpoint must give logprobs, and the rubric points."""
    max_tokens: Count | None = None
    """Tokens of an answer; null = as the rubric says."""
    max_side: Annotated[Side, Field(ge=32)] = 1024
    """Pixels of the longest side of the pictures sent; larger ones are scaled down."""
    request: dict[str, Any] = field(default_factory=dict)
    """Further fields of the request's body, such as {seed: 0}; they replace ours, and null removes
    one: {max_tokens: null, max_completion_tokens: 2000, temperature: null}."""
    concurrency: Concurrency = 8
    """Requests under way."""
    timeout: Seconds = 60.0
    """Seconds for one request."""
    retries: Retries = 4
    """Further tries of a request that failed or whose answer cannot be read."""
    cache: FilePath | None = None
    """Sqlite file that keeps the scores by content, for this run and others; null = none."""
    max_requests: PositiveInt | None = None
    """Requests of the run, retries included; after that images are unscorable. null = no cap."""
    max_cost: PositiveFloat | None = None
    """Cost of the run in the prices' currency; after that images are unscorable. null = no cap."""
    price_prompt: NonNegativeFloat | None = None
    """Price of a million prompt tokens; with both prices the cost is in the log."""
    price_completion: NonNegativeFloat | None = None
    """Price of a million completion tokens."""

    def __post_init__(self) -> None:
        check_url("base_url", self.base_url)
        if (self.price_prompt is None) != (self.price_completion is None):
            raise ValueError("price_prompt and price_completion go together, got one; give both")
        if self.max_cost is not None and self.price_prompt is None:
            raise ValueError("max_cost needs price_prompt and price_completion, got none")
        try:
            rubric = load_rubric(self.criterion)
        except ConfigError as error:
            raise ValueError(f"criterion {error}") from error
        _check_fit(self, rubric)

    @property
    def rubric(self) -> Rubric:
        """The questions to ask: those that rate an aspect that counts."""
        rubric = load_rubric(self.criterion)
        if self.aspects is None:
            return rubric
        asked = tuple(q for q in rubric.questions if set(q.aspects) & set(self.aspects))
        return replace(rubric, questions=asked)

    @property
    def is_groupwise(self) -> bool:
        """See RewardConfig."""
        return self.rubric.is_groupwise

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """See Plug: the model is the endpoint's, and the cache is written."""
        known: dict[str, None] = dict.fromkeys(("model", "cache", "aspects"))
        if self.criterion in SHIPPED:
            known["criterion"] = None
        return find_checkpoints(self, known)

    def hosts(self) -> tuple[Host, ...]:
        """See Plug."""
        return (Host(url=self.base_url, token_env=self.api_key_env),)

    def check(self) -> None:
        """Asks the endpoint for its models, which costs nothing; a model it lacks is a warning.

        Raises:
            ConfigError: if it refuses the key.
            RewardError: if it does not answer.
        """
        url = self.base_url.rstrip("/")
        endpoint = self._endpoint()
        try:
            answer = endpoint.send("GET", f"{url}/models")
            names = [str(model["id"]) for model in answer["data"]]
        except TemporaryFailure as failure:
            fix = "start the endpoint, or correct it"
            raise RewardError(f"base_url: {url}: {failure}; {fix}") from failure
        except PermanentFailure as failure:
            if failure.status in (401, 403):
                fix = "name a variable with a valid key"
                raise ConfigError(f"api_key_env: {url} answers {failure}; {fix}") from failure
            return  # an endpoint may list no models
        except (KeyError, TypeError):
            return
        if self.model not in names:
            fix = nearest(self.model, names) or (one_of(names) if names else "correct it")
            logger.warning("model: %s does not list %r; %s", url, self.model, endpoint.hide(fix))

    def build(self, device: torch.device) -> VlmJudge | VlmRanker:
        """Opens the cache and reads the key; the endpoint is not asked before the first image."""
        prices = (self.price_prompt, self.price_completion)
        ledger = Ledger(self.max_requests, self.max_cost, prices)
        backoff = Backoff(retries=self.retries, base=1.0)
        client = JudgeClient(self.base_url, self._endpoint(), backoff, ledger)
        return VlmRanker(self, client) if self.is_groupwise else VlmJudge(self, client)

    def _endpoint(self) -> Endpoint:
        return open_endpoint(self.timeout, "api_key_env", self.api_key_env, [self.base_url])


@dataclass(frozen=True, slots=True)
class _Requests:
    """What is sent, by a rubric that was read once."""

    config: VlmJudgeConfig
    rubric: Rubric

    def pictures(self, images: Iterable[Tensor], pool: Executor) -> list[str]:
        """Data URLs of pictures ``[3, H, W]``, large ones scaled down."""
        return list(pool.map(partial(data_url, max_side=self.config.max_side), images))

    def references(self, example: Example) -> list[str]:
        """Data URLs of the references that the rubric shows: none, the first, or all."""
        places = {place for question in self.rubric.questions for place in question.places}
        if not places & {"references", "source"}:
            return []
        shown = example.references if "references" in places else example.references[:1]
        return [data_url(picture, self.config.max_side) for picture in shown]

    def body(
        self,
        question: Question,
        pictures: Sequence[str],
        example: Example,
        references: Sequence[str],
    ) -> dict[str, Any]:
        """The request of a question about a picture, or those of a group."""
        config = self.config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": messages(question, pictures, example.prompt, example.subject, references),
            "temperature": 0,
            "max_tokens": config.max_tokens or self.rubric.max_tokens,
            "response_format": answer_format(question, len(pictures)),
        }
        if config.logit_weighted:
            body |= {"logprobs": True, "top_logprobs": _TOP_LOGPROBS}
        body |= config.request
        return {name: value for name, value in body.items() if value is not None}


class _Accounts:
    """What a judge has cost and could not answer."""

    def __init__(self, client: JudgeClient) -> None:
        self._client = client
        self._errors: list[str] = []

    def metrics(self) -> dict[str, float]:
        """See RewardMetrics: requests, retries, failures, cache hits, tokens, and cost if known."""
        return self._client.ledger.totals()

    def restore(self, totals: dict[str, float]) -> None:
        """See Budgeted."""
        self._client.ledger.restore(totals)

    def take_errors(self) -> tuple[str, ...]:
        """See PartialFailures."""
        errors, self._errors = tuple(self._errors), []
        return errors


class VlmJudge(_Accounts):
    """Scores pictures one by one; see VlmJudgeConfig."""

    def __init__(self, config: VlmJudgeConfig, client: JudgeClient) -> None:
        super().__init__(client)
        self._config, self._rubric = config, config.rubric
        self._requests = _Requests(config, self._rubric)
        self._cache = None if config.cache is None else AnswerCache(config.cache)
        self._how: dict[str, Any] = {"logit_weighted": config.logit_weighted}
        if self._rubric.aspects:
            self._how |= {"aspects": config.aspects, "combine": self._rubric.combine}
        if found := revisions(config):
            self._how["checkpoints"] = found

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """See the Protocol; NaN where an image could not be judged, or is not finite: it would be
        sent as a black one."""
        return score_finite(self._score, images, examples)

    def _score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        unique, place = distinct(examples)
        questions = self._rubric.questions
        with ThreadPoolExecutor(min(self._config.concurrency, len(images))) as pool:
            references = list(pool.map(self._requests.references, unique))
            pictures = self._requests.pictures(images.cpu(), pool)
            asked = [
                (question, self._requests.body(question, [picture], example, references[i]))
                for picture, example, i in zip(pictures, examples, place.tolist(), strict=True)
                for question in questions
            ]
            answers = iter(list(pool.map(self._judge, asked)))
        scored = [self._combine([next(answers) for _ in questions]) for _ in examples]
        texts = Counter(text for _, text in scored if text)
        self._errors += failure_lines(texts, len(images))
        scores = [score for score, _ in scored]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _judge(self, asked: tuple[Question, dict[str, Any]]) -> tuple[float, str | None]:
        """Score of one question from the cache or the model; NaN and the reason if none."""
        question, body = asked
        key = content_key({**body, **self._how})
        if self._cache is not None and (known := self._cache.get(key)) is not None:
            self._client.ledger.count("cache_hits")
            return known, None
        try:
            score = self._client.ask(body, partial(self._read, question))
        except (TemporaryFailure, PermanentFailure) as failure:
            return math.nan, f"{self._config.model} at {self._client.url}: {failure}"
        if self._cache is not None:
            self._cache.put(key, score)
        return score, None

    def _read(self, question: Question, choice: Any) -> float:
        """The score in an answer: points, or that of the aspects that count."""
        content = choice["message"].get("content")
        if question.scale is None:
            score = points(content)
            is_weighted = self._config.logit_weighted
            return expected_points(choice.get("logprobs")) if is_weighted else score
        wanted = self._config.aspects or question.aspects
        scores = [v for aspect, v in rating(question, content).items() if aspect in wanted]
        if not scores:
            raise BadAnswer(f"none of the aspects {', '.join(wanted)} applies")
        if self._rubric.combine == "mean":
            return sum(scores) / len(scores)
        return min(scores) / question.scale[1] * 10

    def _combine(self, answers: Sequence[tuple[float, str | None]]) -> tuple[float, str | None]:
        """One score of an image from those of its questions; NaN with one that has failed."""
        values = [value for value, _ in answers]
        reason = next((text for _, text in answers if text), None)
        if self._rubric.combine == "mean":
            return sum(values) / len(values), reason
        return math.prod(values) ** (1 / len(values)), reason


class VlmRanker(_Accounts):
    """Ranks the pictures of a group in one request; see VlmJudgeConfig."""

    def __init__(self, config: VlmJudgeConfig, client: JudgeClient) -> None:
        super().__init__(client)
        self._config = config
        self._requests = _Requests(config, config.rubric)

    def score_groups(self, groups: Sequence[Tensor], examples: Sequence[Example]) -> list[Tensor]:
        """See GroupReward; all NaN where a group could not be ranked."""
        with ThreadPoolExecutor(min(self._config.concurrency, len(groups))) as pool:
            pictures = [self._requests.pictures(images.cpu(), pool) for images in groups]
            ranked = list(pool.map(self._rank, pictures, examples))
        texts = Counter(text for _, text in ranked if text)
        self._errors += failure_lines(texts, len(groups), "groups")
        return [torch.tensor(scores, dtype=torch.float32) for scores, _ in ranked]

    def _rank(self, pictures: Sequence[str], example: Example) -> tuple[list[float], str | None]:
        """Scores of a group's pictures, given as data URLs; NaN and the reason if none."""
        (question,), count = self._requests.rubric.questions, len(pictures)
        body = self._requests.body(question, pictures, example, self._requests.references(example))
        try:
            return self._client.ask(body, partial(_places, count)), None
        except (TemporaryFailure, PermanentFailure) as failure:
            return [math.nan] * count, f"{self._config.model} at {self._client.url}: {failure}"


def _places(count: int, choice: Any) -> list[float]:
    return ranking(choice["message"].get("content"), count)


def _check_fit(config: VlmJudgeConfig, rubric: Rubric) -> None:
    """Refuses options that mean nothing to the rubric.

    Raises:
        ValueError: naming the field; as pydantic wants it.
    """
    kind = rubric.questions[0].answer
    if config.logit_weighted and kind != "points":
        raise ValueError(
            f"logit_weighted must be false for criterion {config.criterion}, whose answer is no "
            "single digit, got true"
        )
    if config.cache is not None and rubric.is_groupwise:
        raise ValueError(
            f"cache must be null for criterion {config.criterion}, got {config.cache!r}; no group "
            "comes twice"
        )
    for aspect in config.aspects or ():
        if aspect not in rubric.aspects:
            there = one_of(rubric.aspects) if rubric.aspects else "null: it has none"
            raise ValueError(
                f"aspects must be of criterion {config.criterion}, got {aspect!r}; use {there}"
            )
    if config.aspects == ():
        raise ValueError("aspects must name one, got []; null counts all")


def data_url(image: Tensor, max_side: int) -> str:
    """Picture ``[3, H, W]`` in [0, 1] as the data URL of a PNG, at most ``max_side`` px long."""
    from PIL import Image

    picture = to_pil(image.detach())
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)  # lossless at any level; this one is fast
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
