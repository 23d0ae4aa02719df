"""Prompts by a language model behind an OpenAI-compatible endpoint; what it says is checked."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

from customized_grpo.errors import ConfigError, DataError
from customized_grpo.rewards.endpoints.answers import BadAnswer, json_objects, text_of
from customized_grpo.rewards.endpoints.http_client import (
    Backoff,
    Endpoint,
    PermanentFailure,
    TemporaryFailure,
    check_url,
    open_endpoint,
)
from customized_grpo.tools.init.prompts import KINDS, Prompt, Prompts, mistake_in, split_prompts

logger = logging.getLogger("customized_grpo")

_AT_ONCE = 20  # prompts of an answer: a longer list becomes monotonous, or is cut off
_ASKED = {
    "context": "puts it into a new place, light or company; it keeps its look",
    "property": "changes one property of it: its colour, its material or the style of the picture",
    "accessory": "gives it something to wear, to hold or to have on it, in a new place",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Writer:
    """Where the language model is."""

    url: str
    """Up to the version, such as http://localhost:8000/v1."""
    model: str
    key_env: str | None = None
    """Environment variable with the key; None: no key is sent."""
    timeout: float = 120.0
    """Seconds for an answer."""
    retries: int = 2
    """Further tries where the endpoint fails."""

    def write(self, words: str, live: bool, count: int) -> Prompts:
        """So many prompts about a class, as many of each kind.

        Raises:
            ConfigError: if the URL or the key cannot be used.
            DataError: if the endpoint fails, or too little of what it says can be used.
        """
        try:
            check_url("--llm", self.url)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        logger.info("asking %s for %d prompts", self.model, count)
        endpoint = open_endpoint(self.timeout, "--llm-key-env", self.key_env, [self.url])
        with endpoint.client:
            author = _Author(self, endpoint, f"a {'live' if live else 'lifeless'} subject", words)
            try:
                needed = {kind: len(range(n, count, len(KINDS))) for n, kind in enumerate(KINDS)}
                found = [p for kind, number in needed.items() for p in author.prompts(kind, number)]
            except (TemporaryFailure, PermanentFailure) as failure:
                said = endpoint.hide(str(failure))
                raise DataError(
                    f"--llm: {self.model} at {self.url}: {said}; try again, or leave --llm out: "
                    "the built-in prompts need no server"
                ) from failure
        return split_prompts(found, f"--llm: {self.model}")


class _Author:
    """Asks until there are enough prompts."""

    def __init__(self, writer: Writer, endpoint: Endpoint, nature: str, words: str) -> None:
        self._writer, self._endpoint, self._words = writer, endpoint, words
        self._task = f"{json.dumps(words, ensure_ascii=False)}, {nature}"
        self._backoff = Backoff(retries=writer.retries, base=1.0)

    def prompts(self, kind: str, count: int) -> list[Prompt]:
        """Raises a PermanentFailure if the answers hold too few that can be used."""
        found: dict[str, str] = {}
        refused: Counter[str] = Counter()
        for _ in range(2 + 2 * -(-count // _AT_ONCE)):
            if len(found) >= count:
                return [Prompt(kind=kind, text=text) for text in list(found.values())[:count]]
            body = self._body(kind, min(_AT_ONCE, count - len(found) + 2), list(found.values()))
            for text in self._backoff.run(lambda body=body: self._ask(body)):
                if mistake := self._mistake(text, found):
                    refused[mistake] += 1
                else:
                    found[text.lower()] = text
        common = "; ".join(f"{n} x {why}" for why, n in refused.most_common(2)) or "empty answers"
        raise PermanentFailure(
            f"only {len(found)} of {count} prompts of the kind {kind} could be used ({common})"
        )

    def _mistake(self, text: Any, found: dict[str, str]) -> str | None:
        if not isinstance(text, str) or not text.strip():
            return "not a text"
        if self._words.lower() not in text.lower():
            return f"does not say {self._words!r}"
        return mistake_in(text) or ("said before" if text.lower() in found else None)

    def _body(self, kind: str, count: int, known: list[str]) -> dict[str, Any]:
        task = (
            f"Write {count} prompts for an image generator about {self._task}. Each is one English "
            f"sentence of at most 25 words without a name, calls the subject by exactly these "
            f"words, can be seen in one picture, and {_ASKED[kind]}. All differ in what they show. "
            'Answer with one JSON object and nothing else: {"prompts": ["...", "..."]}'
        )
        if known:
            task += f" Not again: {json.dumps(known[-_AT_ONCE:], ensure_ascii=False)}"
        messages = [{"role": "user", "content": task}]
        return {"model": self._writer.model, "messages": messages}

    def _ask(self, body: dict[str, Any]) -> list[Any]:
        url = f"{self._writer.url.rstrip('/')}/chat/completions"
        sent = json.dumps(body).encode()
        return _texts(self._endpoint.send("POST", url, sent, "application/json"))


def _texts(answer: Any) -> list[Any]:
    """The list in a chat completion.

    Raises:
        TemporaryFailure: if there is none.
    """
    try:
        text = text_of(answer["choices"][0]["message"]["content"])
        lists = [found["prompts"] for found in json_objects(text) if "prompts" in found]
    except (KeyError, IndexError, TypeError, AttributeError, BadAnswer) as error:
        raise TemporaryFailure("the answer is no chat completion with a text") from error
    if not lists or not isinstance(lists[-1], list):
        raise TemporaryFailure(
            f'the answer holds no JSON object {{"prompts": [...]}}: {" ".join(text.split())[:80]!r}'
        )
    return lists[-1]
