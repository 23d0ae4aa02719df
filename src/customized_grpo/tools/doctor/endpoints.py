"""Rewards that are asked over HTTP: do they answer?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from customized_grpo.config import RunConfig
from customized_grpo.errors import CustomizedGRPOError
from customized_grpo.registry import nearest, one_of
from customized_grpo.rewards.endpoints.http_client import (
    Endpoint,
    PermanentFailure,
    TemporaryFailure,
    read_secret,
)
from customized_grpo.rewards.endpoints.remote import RemoteRewardConfig
from customized_grpo.rewards.endpoints.vlm_judge import VlmJudgeConfig
from customized_grpo.tools.doctor.findings import Finding, from_error, ok, problem, warning

_SECONDS = 10.0


def endpoints(config: RunConfig) -> Iterator[Finding]:
    """A finding for every remote reward and every judge."""
    for section in ("rewards", "evaluators"):
        for number, plug in enumerate(getattr(config, section)):
            check = f"{section}.{number}"
            try:
                if isinstance(plug, RemoteRewardConfig):
                    yield _remote(check, plug)
                elif isinstance(plug, VlmJudgeConfig):
                    yield _judge(check, plug)
            except CustomizedGRPOError as error:
                yield from_error(check, error)


def _remote(check: str, config: RemoteRewardConfig) -> Finding:
    silent = config.connect().silent_replicas()
    answers = len(config.urls) - len(silent)
    if not answers:
        fix = "start one: `cgrpo serve-reward` (docs/remote_rewards.md)"
        return problem(check, f"no replica answers: {'; '.join(silent)}", fix)
    found = f"{answers} of {len(config.urls)} replicas serve {config.reward!r}"
    if silent:
        return warning(check, f"{found}; {'; '.join(silent)}", "start it, or take it out of urls")
    return ok(check, found)


def _judge(check: str, config: VlmJudgeConfig) -> Finding:
    """By the list of models, which costs nothing."""
    import httpx2

    secret, url = read_secret("api_key_env", config.api_key_env), config.base_url.rstrip("/")
    endpoint = Endpoint(client=httpx2.Client(), timeout=_SECONDS, secret=secret)
    try:
        names = _model_names(endpoint.send("GET", f"{url}/models"))
    except TemporaryFailure as failure:
        return problem(check, f"{url}: {failure}", "start the endpoint, or correct base_url")
    except PermanentFailure as failure:
        if failure.status in (401, 403):
            fix = "name a variable with a valid key in api_key_env"
            return problem(check, f"{url} answers {failure}", fix)
        fix = "nothing, if it is a chat-completions endpoint that lists no models"
        return warning(check, f"{url}/models answers {failure}", fix)
    if config.model not in names:
        fix = nearest(config.model, names) or (one_of(names) if names else "correct model")
        return warning(check, f"{url} does not list the model {config.model!r}", fix)
    return ok(check, f"{url} has {config.model}")


def _model_names(answer: Any) -> list[str]:
    try:
        return [str(model["id"]) for model in answer["data"]]
    except (KeyError, TypeError):
        return []
