"""A vision-language model as the judge, behind any OpenAI-compatible chat-completions endpoint.

Plain requests on a pool of threads rather than the openai package: a reward is called from
ordinary code, the connections live as long as the run, and every try is counted against the budget.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from customized_grpo.config import Checkpoint, Host, RewardConfig, find_checkpoints, revisions
from customized_grpo.config.limits import Concurrency, Count, Retries, Seconds, Side, VariableName
from customized_grpo.errors import ConfigError, RewardError
from customized_grpo.pictures import to_pil
from customized_grpo.registry import nearest, one_of
from customized_grpo.rewards.base import distinct
from customized_grpo.rewards.endpoints.answer_cache import AnswerCache, content_key
from customized_grpo.rewards.endpoints.answers import BadAnswer, NoLogprobs, expected_points, points
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
from customized_grpo.rewards.endpoints.rubrics import ANSWER_FORMAT, Criterion, messages
from customized_grpo.types import Example

logger = logging.getLogger("customized_grpo")

_TOP_LOGPROBS = 20  # the most that OpenAI and a vLLM server as it is started by default give


@dataclass(frozen=True, kw_only=True, slots=True)
class VlmJudgeConfig(RewardConfig):
    """Points from 0 to 4 that a vision-language model gives by a rubric."""

    type: Literal["vlm-judge"] = "vlm-judge"  # pyright: ignore[reportIncompatibleVariableOverride]
    base_url: str
    """The endpoint up to its version, such as 'http://localhost:8000/v1'."""
    model: str
    """Name of the model at the endpoint."""
    criterion: Criterion
    """identity = the same subject as in the references; prompt = everything that is asked for."""
    api_key_env: VariableName | None = None
    """Environment variable with the key; null = none is needed."""
    logit_weighted: bool = False
    """Expected points under the probabilities of the digits, instead of the digit: finer. The
    endpoint must give logprobs."""
    max_tokens: Count = 256
    """Tokens of an answer."""
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
    cache: str | None = None
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

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """See Plug: the model is the endpoint's, and the cache is written."""
        return find_checkpoints(self, {"model": None, "cache": None})

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
        try:
            answer = self._endpoint().send("GET", f"{url}/models")
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
            logger.warning("model: %s does not list %r; %s", url, self.model, fix)

    def build(self, device: torch.device) -> VlmJudge:
        """Opens the cache and reads the key; the endpoint is not asked before the first image."""
        return VlmJudge(self, self._endpoint(), Backoff(retries=self.retries, base=1.0))

    def _endpoint(self) -> Endpoint:
        return open_endpoint(self.timeout, "api_key_env", self.api_key_env, [self.base_url])


class VlmJudge:
    """See VlmJudgeConfig."""

    def __init__(self, config: VlmJudgeConfig, endpoint: Endpoint, backoff: Backoff) -> None:
        self._config, self._endpoint, self._backoff = config, endpoint, backoff
        self._url = f"{config.base_url.rstrip('/')}/chat/completions"
        self._cache = None if config.cache is None else AnswerCache(config.cache)
        self._how: dict[str, Any] = {"logit_weighted": config.logit_weighted}
        if found := revisions(config):
            self._how["checkpoints"] = found
        prices = (config.price_prompt, config.price_completion)
        self._ledger = Ledger(config.max_requests, config.max_cost, prices)
        self._structured: bool | None = None
        """Whether the endpoint takes a response_format; None: not known yet."""
        self._errors: list[str] = []

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """See the Protocol; NaN where an image could not be judged."""
        unique, place = distinct(examples)
        side = self._config.max_side
        with ThreadPoolExecutor(min(self._config.concurrency, len(images))) as pool:
            references = list(pool.map(self._references, unique))
            pictures = list(pool.map(lambda image: data_url(image, side), images.cpu()))
            bodies = [
                self._body(picture, example, references[i])
                for picture, example, i in zip(pictures, examples, place.tolist(), strict=True)
            ]
            scored = list(pool.map(self._judge, bodies))
        texts = Counter(text for _, text in scored if text)
        self._errors += failure_lines(texts, len(images))
        scores = [score for score, _ in scored]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def metrics(self) -> dict[str, float]:
        """See RewardMetrics: requests, retries, failures, cache hits, tokens, and cost if known."""
        return self._ledger.totals()

    def restore(self, totals: dict[str, float]) -> None:
        """See Budgeted."""
        self._ledger.restore(totals)

    def take_errors(self) -> tuple[str, ...]:
        """See PartialFailures."""
        errors, self._errors = tuple(self._errors), []
        return errors

    def _references(self, example: Example) -> list[str]:
        if self._config.criterion != "identity":
            return []
        return [data_url(picture, self._config.max_side) for picture in example.references]

    def _body(self, picture: str, example: Example, references: list[str]) -> dict[str, Any]:
        config = self._config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": messages(
                config.criterion, picture, example.prompt, example.subject, references
            ),
            "temperature": 0,
            "max_tokens": config.max_tokens,
            "response_format": ANSWER_FORMAT,
        }
        if config.logit_weighted:
            body |= {"logprobs": True, "top_logprobs": _TOP_LOGPROBS}
        body |= config.request
        return {name: value for name, value in body.items() if value is not None}

    def _judge(self, body: dict[str, Any]) -> tuple[float, str | None]:
        """Score of one image from the cache or the model; NaN and the reason if there is none."""
        key = content_key({**body, **self._how})
        if self._cache is not None and (known := self._cache.get(key)) is not None:
            self._ledger.count("cache_hits")
            return known, None
        tries = 0

        def attempt() -> float:
            nonlocal tries
            tries += 1
            return self._ask(body, is_retry=tries > 1)

        try:
            score = self._backoff.run(attempt)
        except (TemporaryFailure, PermanentFailure) as failure:
            self._ledger.count("failures")
            return math.nan, f"{self._config.model} at {self._url}: {failure}"
        if self._cache is not None:
            self._cache.put(key, score)
        return score, None

    def _ask(self, body: dict[str, Any], is_retry: bool) -> float:
        """Asks the model once, or twice to find out whether it takes a response_format.

        What a server says about it is worded in too many ways, so another try tells: without one
        the rubric asks for JSON all the same.
        """
        plain = {name: value for name, value in body.items() if name != "response_format"}
        if self._structured is False or plain == body:
            return self._read(self._send(plain, is_retry), body)
        try:
            answer = self._send(body, is_retry)
            self._structured = True
        except PermanentFailure as failure:
            if failure.status not in (400, 422) or self._structured:
                raise
            answer = self._send(plain, is_retry=True)
            self._structured = False
        return self._read(answer, body)

    def _send(self, body: dict[str, Any], is_retry: bool) -> Any:
        self._ledger.spend_request()
        if is_retry:
            self._ledger.count("retries")
        content = json.dumps(body).encode()
        try:
            return self._endpoint.send("POST", self._url, content, "application/json")
        except PermanentFailure as failure:
            fix = _fix(str(failure), body) if failure.status in (400, 422) else ""
            raise PermanentFailure(f"{failure}{fix}", failure.status) from failure

    def _read(self, answer: Any, body: dict[str, Any]) -> float:
        if isinstance(answer, dict):
            self._ledger.book(answer.get("usage"))
        try:
            choice = answer["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            refusal, text = message.get("refusal"), message.get("content")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise TemporaryFailure("the answer is no chat completion") from error
        if refusal or finish == "content_filter":
            raise PermanentFailure(f"the model refused: {refusal or finish}")
        if finish == "length":
            raise PermanentFailure(
                f"the answer was cut off at max_tokens = {self._config.max_tokens}; raise it"
            )
        try:
            score = points(text)
            return expected_points(choice.get("logprobs")) if self._config.logit_weighted else score
        except NoLogprobs as error:
            raise PermanentFailure(str(error)) from error
        except BadAnswer as error:
            # At temperature 0 the answer would be the same again.
            kind = PermanentFailure if body.get("temperature") == 0 else TemporaryFailure
            raise kind(str(error)) from error


def _fix(text: str, body: dict[str, Any]) -> str:
    """What to set where a server's refusal names fields of the request."""
    named = [name for name in body if re.search(rf"\b{name}\b", text)]
    if "logprobs" in named or "top_logprobs" in named:
        return "; set logit_weighted: false"
    fields = ", ".join(f"{name}: null" for name in named if name not in ("model", "messages"))
    if not fields:
        return ""
    return f"; `request: {{{fields}}}` leaves it out, and what is wanted instead can stand there"


def data_url(image: Tensor, max_side: int) -> str:
    """Picture ``[3, H, W]`` in [0, 1] as the data URL of a PNG, at most ``max_side`` px long."""
    from PIL import Image

    picture = to_pil(image.detach())
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)  # lossless at any level; this one is fast
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
