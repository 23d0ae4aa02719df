"""What a judge model is asked: rubrics as YAML files, read here, and the conversation they make."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from customized_grpo.config import decode, parse_yaml
from customized_grpo.config.limits import Count
from customized_grpo.errors import ConfigError
from customized_grpo.files import load_text
from customized_grpo.registry import nearest, one_of

MAX_POINTS = 4

_FOLDER = Path(__file__).parent / "criteria"
_MAX_BYTES = 2**20

SHIPPED = tuple(sorted(file.stem for file in _FOLDER.glob("*.yaml")))
"""Names of the criteria that come with the package."""

_TEXTS, _PICTURES = ("prompt", "subject"), ("source", "references", "output", "outputs")
_PLACE = re.compile(rf"\{{({'|'.join((*_TEXTS, *_PICTURES))})\}}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One request about a picture, or about all pictures of a group.

    In ``user``, and nowhere else, places are filled in: {prompt} and {subject} as JSON strings;
    {source}, the first reference; {references}; {output}, the picture to judge, or {outputs}, a
    group's, numbered from 1.
    """

    answer: Literal["points", "list", "headings", "ranking"]
    """points: JSON with a `score` from 0 to 4. list: JSON with a `score` that is a list, one number
    an aspect. headings: lines with the aspect's name, and its score there or below. ranking: JSON
    with a `ranking` of all pictures of the group, the best first."""
    user: str
    system: str = ""
    aspects: tuple[Annotated[str, Field(pattern=r"^[a-z]+(_[a-z]+)*$")], ...] = ()
    """What a list or headings rate, in this order: `image_faithfulness` is the heading `Image
    Faithfulness`."""
    scale: tuple[float, float] | None = None
    """Least and most that an aspect of a list or headings can get."""

    def __post_init__(self) -> None:
        is_rated = self.answer in ("list", "headings")
        if is_rated != bool(self.aspects) or is_rated != (self.scale is not None):
            raise ValueError(
                f"aspects and scale go with the answers list and headings, and only with them; "
                f"answer is {self.answer}: {'give both' if is_rated else 'remove them'}"
            )
        if self.scale and not self.scale[0] < self.scale[1]:
            raise ValueError(f"scale must ascend, got {list(self.scale)}; write [least, most]")
        wanted = "outputs" if self.answer == "ranking" else "output"
        if [name for name in self.places if name.startswith("output")] != [wanted]:
            raise ValueError(
                f"user must hold {{{wanted}}} once, as the answer is {self.answer}; put it where "
                "the picture belongs"
            )

    @property
    def places(self) -> list[str]:
        """Names of the places in ``user``, in order."""
        return _PLACE.findall(self.user)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rubric:
    """A criterion: what is asked, and how answers become one score."""

    questions: Annotated[tuple[Question, ...], Field(min_length=1)]
    combine: Literal["mean", "weakest"] = "mean"
    """mean: of all aspects. weakest: the least aspect of each question on a scale of 10, and of
    several questions the geometric mean (VIEScore, arXiv:2312.14867)."""
    max_tokens: Count = 256
    """Tokens of an answer."""

    def __post_init__(self) -> None:
        if len(self.questions) > 1 and any(q.answer == "ranking" for q in self.questions):
            raise ValueError("questions must be one if it asks for a ranking; split the file")
        if self.combine == "weakest" and any(q.scale is None for q in self.questions):
            raise ValueError("combine must be mean where a question has no aspects, got weakest")

    @property
    def is_groupwise(self) -> bool:
        """Whether it ranks the pictures of a group."""
        return self.questions[0].answer == "ranking"

    @property
    def aspects(self) -> tuple[str, ...]:
        """Of all questions."""
        return tuple(aspect for question in self.questions for aspect in question.aspects)


def load_rubric(criterion: str) -> Rubric:
    """A shipped criterion by its name, or one of the user's by the name of its YAML file.

    Raises:
        ConfigError: if there is none, or it is not valid.
    """
    if criterion in SHIPPED:
        return _read(_FOLDER / f"{criterion}.yaml")
    if criterion.endswith((".yaml", ".yml")):
        return _read(Path(criterion).expanduser())
    fix = nearest(criterion, SHIPPED) or f"use {one_of(SHIPPED)}"
    raise ConfigError(
        f"must be a shipped criterion or a .yaml file with a rubric, got {criterion!r}; {fix}"
    )


def _read(path: Path) -> Rubric:
    try:
        text = load_text(path, _MAX_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}; correct the path") from error
    return decode(parse_yaml(text, str(path)), str(path), Rubric)


def answer_format(question: Question, count: int) -> dict[str, Any] | None:
    """The ``response_format`` of a question about ``count`` pictures; None: it is free text.

    Only our own rubrics have one: a model that was trained to answer in a form does so by itself.
    """
    if question.answer == "points":
        return _schema("judgement", score={"type": "integer", "enum": list(range(MAX_POINTS + 1))})
    if question.answer == "ranking":
        numbers = {"type": "integer", "enum": list(range(1, count + 1))}
        return _schema("ranking", ranking={"type": "array", "items": numbers})
    return None


def _schema(name: str, **answer: dict[str, Any]) -> dict[str, Any]:
    properties = {"reason": {"type": "string"}, **answer}
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    json_schema = {"name": name, "strict": True, "schema": schema}
    return {"type": "json_schema", "json_schema": json_schema}


def messages(
    question: Question, outputs: Sequence[str], prompt: str, subject: str, references: Sequence[str]
) -> list[dict[str, Any]]:
    """The conversation about a picture, or those of a group; pictures are data URLs."""
    numbered = [
        part
        for number, url in enumerate(outputs, 1)
        for part in (_text(f"Picture {number}:"), _picture(url))
    ]
    filled = {
        "prompt": [_text(_quote(prompt))],
        "subject": [_text(_quote(subject))],
        "source": [_picture(url) for url in references[:1]],
        "references": [_picture(url) for url in references],
        "output": [_picture(url) for url in outputs],
        "outputs": numbered,
    }
    # Split once: what is filled in is never looked at for places.
    pieces = _PLACE.split(question.user)
    content: list[dict[str, Any]] = []
    for piece, is_place in zip(pieces, [False, True] * len(pieces), strict=False):
        for part in filled[piece] if is_place else [_text(piece)]:
            _append(content, part)
    system = [{"role": "system", "content": question.system}] if question.system else []
    return [*system, {"role": "user", "content": content}]


def _append(content: list[dict[str, Any]], part: dict[str, Any]) -> None:
    """Adds a part; texts beside each other become one, empty ones are left out."""
    if part["type"] == "text" and content and content[-1]["type"] == "text":
        content[-1] = _text(content[-1]["text"] + part["text"])
    elif part.get("text") != "":
        content.append(part)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # where it ends cannot be faked from inside


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}
