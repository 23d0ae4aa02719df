"""A reward in an environment or on a machine of its own; protocol: docs/remote_rewards.md."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Lock
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from customized_grpo.config import Checkpoint, Host, RewardConfig, find_checkpoints
from customized_grpo.config.limits import Concurrency, Count, Retries, Seconds, VariableName
from customized_grpo.errors import ConfigError, RewardError
from customized_grpo.registry import nearest, one_of
from customized_grpo.rewards.base import score_finite
from customized_grpo.rewards.endpoints.http_client import (
    Backoff,
    Endpoint,
    PermanentFailure,
    TemporaryFailure,
    check_url,
    failure_lines,
    open_endpoint,
)
from customized_grpo.rewards.endpoints.wire import (
    CONTENT_TYPE,
    VERSION,
    Outcome,
    Pixels,
    encode_request,
    read_outcome,
)
from customized_grpo.types import Example

logger = logging.getLogger("customized_grpo")

_PROBE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteRewardConfig(RewardConfig):
    """Scores of a reward that replicas of a server offer (`cgrpo serve-reward`, or your own)."""

    type: Literal["remote"] = "remote"  # pyright: ignore[reportIncompatibleVariableOverride]
    urls: Annotated[tuple[str, ...], Field(min_length=1)]
    """Replicas of the server, such as 'http://gpu2:8100'; the batch is shared out among them."""
    reward: str
    """Name of the reward on the server, as `GET /rewards` lists it."""
    batch_size: Count = 16
    """Most images of one request; a server's own limit must not be lower."""
    concurrency: Concurrency = 2
    """Requests under way per replica; from 2 on, one is sent while another is scored."""
    timeout: Seconds = 120.0
    """Seconds for one request, with its wait in the server's queue."""
    retries: Retries = 3
    """Further tries of a request, on another replica where there is one."""
    pixels: Pixels = "float32"
    """float32 = the very numbers a local reward gets; uint8 = rounded to 8 bit, a quarter of the
    bytes."""
    token_env: VariableName | None = None
    """Environment variable with the server's token; null = none is needed."""

    def __post_init__(self) -> None:
        for number, url in enumerate(self.urls):
            check_url(f"urls.{number}", url)

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """See Plug: the reward's are the server's."""
        return find_checkpoints(self, {"reward": None})

    def hosts(self) -> tuple[Host, ...]:
        """See Plug: the replicas."""
        return tuple(Host(url=url, token_env=self.token_env) for url in self.urls)

    def check(self) -> None:
        """See Plug: asks every replica for its rewards; a silent one is a warning."""
        self._connect().check()

    def build(self, device: torch.device) -> RemoteReward:
        """Connects to the replicas and checks them; one that does not answer may come later."""
        reward = self._connect()
        reward.check()
        return reward

    def _connect(self) -> RemoteReward:
        endpoint = open_endpoint(self.timeout, "token_env", self.token_env, self.urls)
        return RemoteReward(self, endpoint, Backoff(retries=self.retries))


class _Replica:
    """One server and what is known of its health."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.under_way = 0
        self.failures = 0
        """Failures in a row; 0 = healthy."""
        self.rests_until = -math.inf


class RemoteReward:
    """See RemoteRewardConfig."""

    def __init__(self, config: RemoteRewardConfig, endpoint: Endpoint, backoff: Backoff) -> None:
        self._config, self._endpoint, self._backoff = config, endpoint, backoff
        self._clock: Callable[[], float] = time.monotonic
        self._probe_endpoint = replace(endpoint, timeout=min(endpoint.timeout, _PROBE_SECONDS))
        self._replicas = [_Replica(url) for url in config.urls]
        self._lock = Lock()
        self._counts: Counter[str] = Counter()
        self._errors: list[str] = []

    def check(self) -> None:
        """Asks every replica whether it serves the reward in batches of the wanted size.

        Raises:
            RewardError: if none answers.
            ConfigError: if one answers and cannot serve it.
        """
        with ThreadPoolExecutor(len(self._replicas)) as pool:
            texts = [text for text in pool.map(self._check_one, self._replicas) if text is not None]
        if len(texts) == len(self._replicas):
            raise RewardError(
                f"urls: no replica answers: {'; '.join(texts)}; start one with `cgrpo serve-reward`"
            )
        for text in texts:
            logger.warning("reward %s: not there yet: %s", self._config.label, text)

    def _check_one(self, replica: _Replica) -> str | None:
        """Why a replica does not answer; None: it does."""
        try:
            answer = self._probe_endpoint.send("GET", f"{replica.url}/rewards")
        except TemporaryFailure as failure:
            self._rest(replica, failure)
            return f"{replica.url}: {failure}"
        except PermanentFailure as failure:
            raise ConfigError(f"urls: {replica.url} answers {failure}; correct it") from failure
        try:
            served = {reward["name"]: reward for reward in answer["rewards"]}
            version, max_images = answer["version"], answer["limits"]["max_images"]
        except (KeyError, TypeError) as error:
            raise ConfigError(f"urls: {replica.url} is no reward server; correct it") from error
        if version != VERSION:
            got = self._endpoint.hide(repr(version))
            raise ConfigError(
                f"urls: {replica.url} must speak version {VERSION} of the protocol, got "
                f"{got}; install the same customized-grpo on both sides"
            )
        if self._config.reward not in served:
            fix = self._endpoint.hide(nearest(self._config.reward, served) or one_of(served))
            raise ConfigError(
                f"reward must be one that {replica.url} serves, got {self._config.reward!r}; {fix}"
            )
        if self._config.batch_size > max_images:
            raise ConfigError(
                f"batch_size must be at most {max_images}, which {replica.url} takes, got "
                f"{self._config.batch_size}; lower it or raise the server's max_images"
            )
        return None

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """See the Protocol; NaN for images that no replica could score, or that are not finite: a
        server refuses the whole request of one.

        Raises:
            RewardError: if no request for any of them got through.
        """
        return score_finite(self._score, images, examples)

    def _score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        with ThreadPoolExecutor(self._config.concurrency * len(self._replicas)) as pool:
            list(pool.map(self._probe, self._replicas))
            healthy = sum(not replica.failures for replica in self._replicas) or 1
            size = min(self._config.batch_size, math.ceil(len(images) / healthy))
            rows = torch.arange(len(images)).split(size)
            parts = list(pool.map(lambda part: self._part(images, examples, part), rows))
        scores = [math.nan if v is None else v for part, _ in parts for v in part.scores]
        self._add(failed_images=sum(not math.isfinite(value) for value in scores))
        said = (text for part, _ in parts for text in part.errors if text)
        texts = Counter(map(self._endpoint.hide, said))
        if not any(arrived for _, arrived in parts):
            raise RewardError(
                f"urls: none of {', '.join(self._config.urls)} scored any of the {len(images)} "
                f"images: {'; '.join(failure_lines(texts, len(images)))}"
            )
        self._errors += failure_lines(texts, len(images))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def metrics(self) -> dict[str, float]:
        """See RewardMetrics."""
        counts = {name: float(self._counts[name]) for name in ("requests", "failed_images")}
        healthy = sum(not replica.failures for replica in self._replicas)
        retries = float(self._counts["requests"] - self._counts["parts"])
        return {**counts, "retries": retries, "healthy_replicas": float(healthy)}

    def restore(self, totals: dict[str, float]) -> None:
        """See Budgeted."""
        requests, retries, failed = (
            int(totals.get(name, 0)) for name in ("requests", "retries", "failed_images")
        )
        with self._lock:
            self._counts = Counter(
                requests=requests, parts=requests - retries, failed_images=failed
            )

    def take_errors(self) -> tuple[str, ...]:
        """See PartialFailures."""
        errors, self._errors = tuple(self._errors), []
        return errors

    def _part(
        self, images: Tensor, examples: Sequence[Example], rows: Tensor
    ) -> tuple[Outcome, bool]:
        """Scores of some rows, and whether a replica gave them; if not, they are None."""
        count = len(rows)
        body = encode_request(
            self._config.reward,
            images[rows.to(images.device)],
            [examples[i] for i in rows.tolist()],
            self._config.pixels,
        )
        last: list[_Replica] = []

        def attempt() -> Outcome:
            replica = self._pick(last)
            last[:] = [replica]
            try:
                return self._request(replica, body, count)
            finally:
                with self._lock:
                    replica.under_way -= 1

        self._add(parts=1)
        try:
            return self._backoff.run(attempt), True
        except (TemporaryFailure, PermanentFailure) as failure:
            text = f"{last[0].url}: {failure}"
            return Outcome(scores=[None] * count, errors=[text] * count), False

    def _request(self, replica: _Replica, body: bytes, count: int) -> Outcome:
        self._add(requests=1)
        try:
            answer: Any = self._endpoint.send("POST", f"{replica.url}/score", body, CONTENT_TYPE)
            outcome = read_outcome(answer, count)
        except (TemporaryFailure, ValueError) as error:
            failure = error if isinstance(error, TemporaryFailure) else TemporaryFailure(str(error))
            self._rest(replica, failure)
            # Its wish to be left alone matters only if there is nobody else to ask.
            wait = None if self._is_any_ready() else failure.retry_after
            raise TemporaryFailure(str(error), wait) from error
        replica.failures = 0
        return outcome

    def _pick(self, avoid: Sequence[_Replica]) -> _Replica:
        """Chooses the least busy healthy replica, and another than the last where there is one."""
        with self._lock:
            now = self._clock()
            replica = min(
                self._replicas,
                key=lambda r: (r.failures > 0, r.rests_until > now, r in avoid, r.under_way),
            )
            replica.under_way += 1
            return replica

    def _rest(self, replica: _Replica, failure: TemporaryFailure) -> None:
        """A busy server named the time; a broken one is left alone for longer each time."""
        with self._lock:
            seconds = failure.retry_after
            if seconds is None:
                replica.failures += 1
                seconds = min(60.0, 5.0 * 2 ** (replica.failures - 1))
            replica.rests_until = self._clock() + seconds

    def _is_any_ready(self) -> bool:
        with self._lock:
            now = self._clock()
            return any(not r.failures and r.rests_until <= now for r in self._replicas)

    def _probe(self, replica: _Replica) -> None:
        """Takes a replica back that failed, had its rest, and says that it is well."""
        if not replica.failures or replica.rests_until > self._clock():
            return
        try:
            self._probe_endpoint.send("GET", f"{replica.url}/health")
        except (TemporaryFailure, PermanentFailure) as failure:
            self._rest(replica, TemporaryFailure(str(failure)))
        else:
            replica.failures = 0

    def _add(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)
