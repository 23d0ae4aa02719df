"""Where the change from base to tuned lies in SARS's plane, in words and as a small picture."""

from __future__ import annotations

from itertools import count
from typing import Literal

Quadrant = Literal["synergy", "copy", "forgets", "worse", "same"]

WORDS: dict[Quadrant, str] = {
    "synergy": "Nearer to the subject and nearer to the prompt. SARS rewards this most.",
    "copy": "Nearer to the subject, further from the prompt: towards a copy of the reference.",
    "forgets": "Nearer to the prompt, further from the subject: the subject is being forgotten.",
    "worse": "Further from both.",
    "same": "No change in one of the two: on the border between quadrants.",
}
CAVEAT = (
    "This is one picture, judged by the rewards of the training. For means over many held-out "
    "pictures, by models that were not trained on: <code>cgrpo evaluate</code>."
)
_HALF, _MARGIN = 90, 22
_CORNERS = (
    ("synergy", 1, 1), ("copy", 1, -1), ("forgets", -1, 1), ("worse", -1, -1)
)  # fmt: skip


def quadrant(identity: float, prompt: float) -> Quadrant:
    """Name of the quadrant of a change."""
    if identity == 0 or prompt == 0:
        return "same"
    if identity > 0:
        return "synergy" if prompt > 0 else "copy"
    return "forgets" if prompt > 0 else "worse"


def plot(identity: float, prompt: float) -> str:
    """An SVG: identity to the right, prompt upwards, each on the scale that its rewards need."""
    name = quadrant(identity, prompt)
    middle = _HALF + _MARGIN
    side = 2 * middle
    reach = [_reach(change) for change in (identity, prompt)]
    x, y = middle + _HALF * identity / reach[0], middle - _HALF * prompt / reach[1]
    return (
        f'<svg class="plane" viewBox="0 0 {side} {side}" role="img" aria-label="Change from '
        f'base to tuned: identity {identity:+.3f}, prompt {prompt:+.3f}: {name}">'
        + "".join(_corner(corner, dx, dy, corner == name) for corner, dx, dy in _CORNERS)
        + f'<path class="axes" d="M{_MARGIN} {middle}h{2 * _HALF}M{middle} {_MARGIN}'
        f'v{2 * _HALF}"/>'
        f'<text x="{middle}" y="14">prompt (±{reach[1]:g})</text>'
        f'<text x="{middle}" y="{side - 6}">identity (±{reach[0]:g})</text>'
        f'<path class="change" d="M{middle} {middle}L{x:.1f} {y:.1f}"/>'
        f'<circle class="base" cx="{middle}" cy="{middle}" r="3.5"/>'
        f'<circle class="tuned" cx="{x:.1f}" cy="{y:.1f}" r="6"/></svg>'
    )


def _reach(change: float) -> float:
    """Where an axis ends: the next of 0.01, 0.02, 0.05, ... that keeps the point off the names."""
    ends = (m * 10**e for e in count(-2) for m in (1, 2, 5))
    return next(end for end in ends if end > 1.35 * abs(change))


def _corner(name: str, dx: int, dy: int, here: bool) -> str:
    left = _MARGIN + (_HALF if dx > 0 else 0)
    top = _MARGIN + (_HALF if dy < 0 else 0)
    baseline = top + (14 if dy > 0 else _HALF - 6)
    return (
        f'<rect class="{"here" if here else "there"}" x="{left}" y="{top}" width="{_HALF}" '
        f'height="{_HALF}"/><text x="{left + _HALF // 2}" y="{baseline}">{name}</text>'
    )
