"""From a judge model's answer to a number."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from customized_grpo.rewards.endpoints.rubrics import MAX_POINTS

_POINTS = re.compile(rf"(\d+(?:[.,]\d+)?)\s*(?:/\s*{MAX_POINTS})?")
# What is left of JSON that a model has not escaped, or of "Score: 3".
_SAID = re.compile(
    rf"""\bscore\b["'*\s]*[:=][\s"'*]*{_POINTS.pattern}["'*\s]*(?=[,}}\]\n]|$)""", re.IGNORECASE
)
_SCORE = re.compile(r'"score"\s*:\s*"?([0-9])')


class BadAnswer(Exception):
    """An answer without a score that can be read."""


class NoLogprobs(BadAnswer):
    """The endpoint does not give what it was asked for; asking again would not help."""


def text_of(content: Any) -> str:
    """The text of a message's `content`, which is one or is made of parts.

    Raises:
        BadAnswer: if there is none.
    """
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str) or not content.strip():
        raise BadAnswer(f"the answer has no text (content: {json.dumps(content)[:80]})")
    return content


def points(content: Any) -> float:
    """The score in the last JSON object of an answer, whatever is written around it.

    Where the JSON is not valid, as with a quote or a line break in the reason, the last
    `"score": N` counts.

    Raises:
        BadAnswer: if there is none, or it is no number from 0 to 4.
    """
    text = text_of(content)
    found = [value["score"] for value in json_objects(text) if "score" in value]
    found = found or [match[1] for match in _SAID.finditer(text)]
    if not found:
        raise BadAnswer(f"the answer has no JSON object with a score: {_short(text)}")
    score = found[-1]
    try:
        said = _POINTS.fullmatch(score.strip()) if isinstance(score, str) else None
        number = said[1].replace(",", ".") if said else score
        value = math.nan if isinstance(score, bool) else float(number)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 <= value <= MAX_POINTS:
        raise BadAnswer(f"the score must be a number from 0 to {MAX_POINTS}, got {_short(score)}")
    return value


def json_objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects in a text: a model may think aloud before, or put them in a code fence."""
    objects: list[dict[str, Any]] = []
    decoder, place = json.JSONDecoder(strict=False), text.find("{")  # line breaks in strings
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            objects.append(value)
        place = text.find("{", end)
    return objects


def expected_points(logprobs: Any) -> float:
    """Mean score under the probabilities of the digits 0-4 at the place of the score's token.

    ``logprobs`` is a choice's `logprobs` in the form of OpenAI's chat completions. Finer than the
    digit itself: a judge that wavers between 2 and 3 says so.

    Raises:
        NoLogprobs: if there are none.
        BadAnswer: if they are malformed, or the digit is not in them.
    """
    tokens = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not tokens:
        raise NoLogprobs("the answer has no logprobs; set logit_weighted: false")
    try:
        token, place = _digit_token(tokens)
        head, tail = token["token"][:place], token["token"][place + 1 :]
        weights: dict[int, float] = {}
        for option in (token, *token["top_logprobs"]):
            for digit in range(MAX_POINTS + 1):
                if option["token"] == f"{head}{digit}{tail}":
                    weights[digit] = math.exp(float(option["logprob"]))
    except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
        raise BadAnswer(f"the answer's logprobs are malformed: {error!r}") from error
    total = sum(weights.values())
    if not (total > 0 and math.isfinite(total)):
        raise BadAnswer("the answer's logprobs give none of the digits 0-4 a probability")
    return sum(digit * weight for digit, weight in weights.items()) / total


def _digit_token(tokens: Any) -> tuple[Any, int]:
    """The token that holds the score's digit, and the digit's place in it."""
    matches = list(_SCORE.finditer("".join(token["token"] for token in tokens)))
    if not matches:
        raise BadAnswer("the answer's logprobs hold no score")
    place = matches[-1].start(1)
    for token in tokens:
        if place < len(token["token"]):
            return token, place
        place -= len(token["token"])
    raise AssertionError("the match lies in the tokens")


def _short(value: Any) -> str:
    """As it is: what cannot be seen, such as a line break, is escaped."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 160 else f"{text[:157]}..."
