"""What the page shows beside pictures, as HTML. All that came from outside is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from customized_grpo.tools.playground.quadrant import CAVEAT, WORDS, plot, quadrant
from customized_grpo.tools.playground.request import Comparison
from customized_grpo.tools.playground.session import Session

_BASE_ONLY = (
    "the base: there is nothing trained here. <code>cgrpo playground RUN</code> shows it beside "
    "what a run has trained."
)


def heading(session: Session) -> str:
    """Whose pictures these are."""
    shown = "base and tuned, from the same noise" if session.trained() else _BASE_ONLY
    return f"<h1>{escape(session.config.name)}</h1><p>{shown}</p>{_receivers(session)}"


def _receivers(session: Session) -> str:
    """Where pictures go, if anywhere."""
    found = [f"{', '.join(hosts)} ({reward})" for reward, hosts in session.receivers.items()]
    text = f"To be scored, pictures and prompts are sent to {'; '.join(found)}."
    return f"<p>{escape(text)}</p>" if found else ""


def error(text: str) -> str:
    """A message that screen readers read at once."""
    return f'<p class="error" role="alert">{escape(_sentence(text))}</p>'


def note(text: str) -> str:
    """A message."""
    return f'<p role="status">{escape(_sentence(text))}</p>'


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def answer(drawn: Comparison, objectives: Mapping[str, str]) -> str:
    """What was drawn, its rewards, what could not be scored, and the quadrant."""
    parts = (_caption(drawn), _table(drawn, objectives), _errors(drawn), _plane(drawn))
    return "".join(parts)


def _caption(drawn: Comparison) -> str:
    request = drawn.request
    words = [f"“{request.example.prompt}”", f"seed {request.seed}"]
    if request.trained is not None:
        words.append(f"weights {request.trained.label}")
        if request.trained.is_lora:
            words.append(f"strength {request.strength:g}")
    return f'<p class="caption">{escape(", ".join(words))}</p>'


def _table(drawn: Comparison, objectives: Mapping[str, str]) -> str:
    base, tuned = drawn.base.scores, drawn.tuned and drawn.tuned.scores
    heads = ("reward", "base") if tuned is None else ("reward", "base", "tuned", "change")
    rows = []
    for reward, objective in objectives.items():
        cells = [_number(base[reward])]
        if tuned is not None:
            cells += [_number(tuned[reward]), _number(tuned[reward] - base[reward], "+")]
        name = f"{escape(objective)} <small>{escape(reward)}</small>"
        values = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{name}</th>{values}</tr>')
    head = "".join(f'<th scope="col">{head}</th>' for head in heads)
    body = "".join(rows)
    return f'<table class="scores"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _number(value: float, sign: str = "") -> str:
    return "not scored" if math.isnan(value) else f"{value:{sign}.3f}"


def _errors(drawn: Comparison) -> str:
    found = [*drawn.base.errors, *(drawn.tuned.errors if drawn.tuned else ())]
    return "".join(error(text) for text in dict.fromkeys(found))


def _plane(drawn: Comparison) -> str:
    """The quadrant, where both objectives are known."""
    identity, prompt = (drawn.change.get(name, math.nan) for name in ("identity", "prompt"))
    if math.isnan(identity + prompt):
        return ""
    name = quadrant(identity, prompt)
    return (
        f'<div class="verdict">{plot(identity, prompt)}'
        f"<div><h3>{name.capitalize()}</h3><p>{WORDS[name]}</p>"
        f"<p><small>{CAVEAT}</small></p></div></div>"
    )
