"""Asks a judge model, counts what that costs, and reads the answer or says why there is none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

from customized_grpo.rewards.endpoints.answers import BadAnswer, NoLogprobs
from customized_grpo.rewards.endpoints.budget import Ledger
from customized_grpo.rewards.endpoints.http_client import (
    Backoff,
    Endpoint,
    PermanentFailure,
    TemporaryFailure,
)

T = TypeVar("T")

_LONGEST = 320  # of a message


class JudgeClient:
    """An OpenAI-compatible chat-completions endpoint; for many threads."""

    def __init__(self, base_url: str, endpoint: Endpoint, backoff: Backoff, ledger: Ledger) -> None:
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self.ledger = ledger
        self._endpoint, self._backoff = endpoint, backoff
        self._structured: bool | None = None
        """Whether the endpoint takes a response_format; None: not known yet."""

    def ask(self, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """What ``read`` makes of the first choice of the answer; tries again what may pass.

        ``read`` raises BadAnswer where it can make nothing of it.

        Raises:
            TemporaryFailure, PermanentFailure: why there is no answer; counted as a failure.
        """
        tries = 0

        def attempt() -> T:
            nonlocal tries
            tries += 1
            choice = self._ask(body, is_retry=tries > 1)
            try:
                return read(choice)
            except NoLogprobs as error:
                raise PermanentFailure(str(error)) from error
            except BadAnswer as error:
                # At temperature 0 the answer would be the same again.
                kind = PermanentFailure if body.get("temperature") == 0 else TemporaryFailure
                raise kind(str(error)) from error

        try:
            return self._backoff.run(attempt)
        except (TemporaryFailure, PermanentFailure) as failure:
            self.ledger.count("failures")
            text = self._endpoint.hide(str(failure))  # all that it cites of the answer, then cut
            failure.args = (text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}...",)
            raise

    def _ask(self, body: dict[str, Any], is_retry: bool) -> Any:
        """Asks the model once, or twice to find out whether it takes a response_format.

        What a server says about it is worded in too many ways, so another try tells: without one
        the rubric asks for JSON all the same.
        """
        plain = {name: value for name, value in body.items() if name != "response_format"}
        if self._structured is False or plain == body:
            return self._first_choice(self._send(plain, is_retry), body)
        try:
            answer = self._send(body, is_retry)
            self._structured = True
        except PermanentFailure as failure:
            if failure.status not in (400, 422) or self._structured:
                raise
            answer = self._send(plain, is_retry=True)
            self._structured = False
        return self._first_choice(answer, body)

    def _send(self, body: dict[str, Any], is_retry: bool) -> Any:
        self.ledger.spend_request()
        if is_retry:
            self.ledger.count("retries")
        content = json.dumps(body).encode()
        try:
            return self._endpoint.send("POST", self.url, content, "application/json")
        except PermanentFailure as failure:
            fix = _fix(str(failure), body) if failure.status in (400, 422) else ""
            raise PermanentFailure(f"{failure}{fix}", failure.status) from failure

    def _first_choice(self, answer: Any, body: dict[str, Any]) -> Any:
        """A choice with a message that was said to its end."""
        if isinstance(answer, dict):
            self.ledger.book(answer.get("usage"))
        try:
            choice = answer["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            refusal = message.get("refusal")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise TemporaryFailure("the answer is no chat completion") from error
        if refusal or finish == "content_filter":
            raise PermanentFailure(f"the model refused: {refusal or finish}")
        if finish == "length":
            limit = body.get("max_tokens", "the endpoint's")
            raise PermanentFailure(f"the answer was cut off at max_tokens = {limit}; raise it")
        return choice


def _fix(text: str, body: dict[str, Any]) -> str:
    """What to set where a server's refusal names fields of the request."""
    named = [name for name in body if re.search(rf"\b{name}\b", text)]
    if "logprobs" in named or "top_logprobs" in named:
        return "; set logit_weighted: false"
    fields = ", ".join(f"{name}: null" for name in named if name not in ("model", "messages"))
    if not fields:
        return ""
    return f"; `request: {{{fields}}}` leaves it out, and what is wanted instead can stand there"
