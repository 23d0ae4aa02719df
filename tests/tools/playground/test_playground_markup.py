"""What is shown beside the pictures, and that nothing of it is code."""

from __future__ import annotations

import dataclasses
import math
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from PIL import Image

from customized_grpo.tools.playground import markup
from customized_grpo.tools.playground.request import Comparison, Drawn, DrawRequest
from customized_grpo.types import Example

EVIL = "<script>alert(1)</script>\"'&"


@pytest.mark.parametrize(
    ("identity", "prompt", "name"),
    [
        (0.1, 0.01, "synergy"),
        (0.1, -0.01, "copy"),
        (-0.1, 0.01, "forgets"),
        (-0.1, -0.01, "worse"),
        (0.0, 0.1, "on the border"),
        (-0.1, 0.0, "on the border"),
        (0.0, 0.0, "no difference to speak of"),
    ],
)
def test_signs_name_the_quadrant(identity: float, prompt: float, name: str) -> None:
    assert markup.quadrant(identity, prompt) == name


def compared(base: float = 0.2, text: str = EVIL) -> Comparison:
    example = Example(id="x", prompt=text, references=(torch.zeros(3, 32, 32),), subject="")
    image = Image.new("RGB", (64, 64))
    return Comparison(
        request=DrawRequest(example=example, seed=3, trained=None, strength=1.0),
        base=Drawn(image=image, scores={"r": base}, errors=(text,) if math.isnan(base) else ()),
        tuned=Drawn(image=image, scores={"r": 0.25}),
        change={"identity": 0.05, "prompt": 0.1},
        spread={"identity": 0.1, "prompt": 0.1},
    )


def test_what_people_type_is_no_code() -> None:
    parts = [
        markup.error(EVIL),
        markup.note(EVIL),
        markup.answer(compared(math.nan), {"r": EVIL}),
    ]
    for part in parts:
        assert "&lt;script&gt;" in part
        assert "<script" not in part
        assert not re.search(r"&(?!\w+;|#)", part)
        ET.fromstring(f"<div>{part}</div>")  # well formed: no quote ends an attribute


def test_the_table_has_scores_and_their_change() -> None:
    html = markup.answer(compared(), {"r": "identity"})
    cells = re.findall(r"<td>(.*?)</td>", html)
    assert cells == ["0.200", "0.250", "+0.050"]
    assert "<h3>Synergy</h3>" in html
    unknown = markup.answer(compared(math.nan), {"r": "identity"})
    assert re.findall(r"<td>(.*?)</td>", unknown) == ["not scored", "0.250", "not scored"]


def test_changes_that_are_slight_are_no_synergy() -> None:
    """As +.001 and +.002 on a smudge were."""
    slight = dataclasses.replace(compared(), change={"identity": 0.001, "prompt": 0.002})
    html = markup.answer(slight, {"r": "identity"})
    assert "<h3>No difference to speak of</h3><p>identity +0.001, prompt +0.002:" in html
    assert "rewards this most" not in html
    one = dataclasses.replace(compared(), change={"identity": 0.05, "prompt": 0.002})
    assert "<h3>On the border</h3>" in markup.answer(one, {"r": "identity"})
    unknown = markup.answer(dataclasses.replace(compared(), spread={}), {"r": "identity"})
    assert "<h3>" not in unknown
    assert "identity +0.050, prompt +0.100. Whether that is much cannot be said" in unknown


def test_without_both_objectives_there_is_no_quadrant() -> None:
    asked = compared()
    for change in ({}, {"identity": 0.1}, {"identity": 0.1, "prompt": math.nan}):
        only = Comparison(request=asked.request, base=asked.base, tuned=asked.tuned, change=change)
        assert "<h3>" not in markup.answer(only, {"r": "identity"})
    base_only = Comparison(request=asked.request, base=asked.base)
    assert re.findall(r"<td>(.*?)</td>", markup.answer(base_only, {"r": "identity"})) == ["0.200"]
