"""From a judge model's answer to a number."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from customized_grpo.rewards.endpoints.rubrics import MAX_POINTS, Question

_POINTS = re.compile(rf"(\d+(?:[.,]\d+)?)\s*(?:/\s*{MAX_POINTS})?")
# What is left of JSON that a model has not escaped, or of "Score: 3".
_SAID = re.compile(
    rf"""\bscore\b["'*\s]*[:=][\s"'*]*{_POINTS.pattern}["'*\s]*(?=[,}}\]\n]|$)""", re.IGNORECASE
)
_SCORE = re.compile(r'"score"\s*:\s*"?([0-9])')
_NUMBER = r"[-+]?\d+(?:\.\d+)?"


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
        raise BadAnswer(f"the answer has no text (content: {_escaped(content)})")
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
        raise BadAnswer(f"the answer has no JSON object with a score: {_escaped(text)}")
    score = found[-1]
    try:
        said = _POINTS.fullmatch(score.strip()) if isinstance(score, str) else None
        number = said[1].replace(",", ".") if said else score
        value = math.nan if isinstance(score, bool) else float(number)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 <= value <= MAX_POINTS:
        raise BadAnswer(f"the score must be a number from 0 to {MAX_POINTS}, got {_escaped(score)}")
    return value


def rating(question: Question, content: Any) -> dict[str, float]:
    """Aspect -> score, by an answer that is a list or has headings; without those that do not
    apply.

    Raises:
        BadAnswer: if a score is missing or out of scale, or no aspect applies.
    """
    assert question.scale is not None
    text = text_of(content)
    if question.answer == "list":
        found = _numbers(text, "score")
        if len(found) != len(question.aspects):
            raise BadAnswer(
                f"the score must be a list of {len(question.aspects)} numbers, one for each of "
                f"{', '.join(question.aspects)}: {_escaped(text)}"
            )
        scores = dict(zip(question.aspects, found, strict=True))
    else:
        under = {
            aspect: _under_heading(aspect, question.aspects, text) for aspect in question.aspects
        }
        scores = {aspect: score for aspect, score in under.items() if score is not None}
    least, most = question.scale
    for aspect, score in scores.items():
        if not least <= score <= most:
            raise BadAnswer(f"{aspect} must be from {least:g} to {most:g}, got {score:g}")
    if not scores:
        raise BadAnswer(f"no aspect applies: {_escaped(text)}")
    return scores


def _under_heading(aspect: str, aspects: Sequence[str], text: str) -> float | None:
    """The score in the part of an aspect; None where it says N/A."""
    headings = "|".join(re.escape(other).replace("_", r"\s+") for other in aspects)
    parts = re.split(rf"^[\W\d]*({headings})\b", text, flags=re.IGNORECASE | re.MULTILINE)
    names = ["_".join(name.lower().split()) for name in parts[1::2]]
    # On the heading's own line, or at the beginning of one below it.
    score = re.compile(
        rf"^\W*score\b\W*(?:\([^)\n]*\))?\W*[:=]\W*?({_NUMBER}|N/?A\b)",
        re.IGNORECASE | re.MULTILINE,
    )
    own = [part for name, part in zip(names, parts[2::2], strict=True) if name == aspect]
    said = [match[1] for part in own if (match := score.search(part))]
    if not said:
        raise BadAnswer(f"the answer has no score of {aspect.replace('_', ' ')}: {_escaped(text)}")
    return None if said[-1][0] in "nN" else float(said[-1])


def ranking(content: Any, count: int) -> list[float]:
    """Scores of ``count`` pictures by their places in an answer's ranking: the best gets 1, the
    worst 0, and the others lie evenly between.

    Raises:
        BadAnswer: if it does not name each picture once.
    """
    text = text_of(content)
    places = _numbers(text, "ranking")
    if sorted(places) != list(range(1, count + 1)):
        raise BadAnswer(
            f"the ranking must name each picture from 1 to {count} once: {_escaped(text)}"
        )
    return [1 - places.index(number) / (count - 1) for number in range(1, count + 1)]


def _numbers(text: str, field: str) -> list[float]:
    """The numbers of the last `"field": [...]` in a text, whether or not it is valid JSON around
    it; [] if there is none, or something else is among them."""
    said = re.findall(rf"""["']{field}["']\s*:\s*\[([^\]]*)\]""", text)
    pieces = [piece.strip() for piece in said[-1].split(",")] if said else []
    are_numbers = all(re.fullmatch(_NUMBER, piece) for piece in pieces)
    return [float(piece) for piece in pieces] if are_numbers else []


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


def _escaped(value: Any) -> str:
    """As it is: what cannot be seen, such as a line break, is escaped."""
    return json.dumps(value, ensure_ascii=False, default=str)
