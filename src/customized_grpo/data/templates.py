"""Prompt templates for photos of a subject: new places, companions, light, looks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from customized_grpo.errors import DataError
from customized_grpo.files import read_text

PLACEHOLDER = "{subject}"
BRACES = re.compile(r"\{[^{}]*\}")
"""A placeholder, also one that nobody fills."""

_ANYWHERE = (
    "a photo of {subject} beside a mountain lake at dawn",
    "{subject} on a city pavement after the rain",
    "a close-up of {subject} on a bed of moss",
    "{subject} in a sunlit greenhouse",
    "{subject} on a sand dune under a clear sky",
    "a photo of {subject} among fallen leaves",
    "{subject} in front of a bookshelf",
    "{subject} on a frozen pond",
    "{subject} in a field of lavender",
    "a photo of {subject} by a window at night",
    "{subject} on a stone bridge in the fog",
    "{subject} in a market hall full of fruit",
    "{subject} as a watercolour painting",
    "a pencil drawing of {subject}",
    "a blue {subject} on a plain background",
)

LIVE = (
    *_ANYWHERE,
    "{subject} wearing a knitted scarf",
    "{subject} wearing a straw hat in a garden",
    "{subject} in a yellow raincoat on a pier",
    "{subject} wearing round glasses and reading a newspaper",
    "{subject} dressed as an astronaut",
    "{subject} sleeping on a sofa",
    "{subject} running along a beach",
    "{subject} looking out of a train window",
    "{subject} sitting at a café table",
    "{subject} jumping over a puddle",
)

INANIMATE = (
    *_ANYWHERE,
    "{subject} on a marble kitchen worktop",
    "{subject} on a pile of old maps",
    "{subject} held in two open hands",
    "{subject} in a shop window with warm lights",
    "{subject} drifting on a calm river",
    "{subject} covered in fresh snow",
    "{subject} made of glass",
    "{subject} next to a cup of tea",
    "{subject} on a picnic blanket",
    "{subject} on a workbench among tools",
)


def read_templates(given: str | Sequence[str]) -> tuple[str, ...]:
    """Your templates: a list, or the path of a text file with one a line.

    Raises:
        DataError: if the file cannot be read, there are none, or one lacks the subject.
    """
    lines, where = given, "templates"
    if isinstance(given, str):
        where = given
        lines = read_text(Path(given), f"templates: {given}").split("\n")
    templates = tuple(line.strip() for line in lines if line.strip())
    if not templates:
        raise DataError(f"{where}: must hold at least one template, got none")
    for template in templates:
        if PLACEHOLDER not in template:
            raise DataError(
                f"{where}: a template must have {PLACEHOLDER} in it, got {template!r}; write for "
                f"example 'a photo of {PLACEHOLDER} on the beach'"
            )
        if unknown := BRACES.search(template.replace(PLACEHOLDER, "")):
            raise DataError(
                f"{where}: a template must have no placeholder but {PLACEHOLDER}, got "
                f"{unknown[0]!r} in {template!r}; write the words that it stands for"
            )
    return tuple(dict.fromkeys(templates))


def fill(template: str, subject: str) -> str:
    """The prompt that a template makes for a subject."""
    return template.replace(PLACEHOLDER, subject)
