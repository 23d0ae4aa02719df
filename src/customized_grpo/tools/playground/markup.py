"""What the page shows beside pictures, as HTML. All that came from outside is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Literal

from customized_grpo.ops.significance import SLIGHT
from customized_grpo.tools.playground.request import Comparison
from customized_grpo.tools.playground.session import Session

Quadrant = Literal[
    "synergy", "copy", "forgets", "worse", "on the border", "no difference to speak of"
]

_WORDS: dict[Quadrant, str] = {
    "synergy": "Nearer to the subject and nearer to the prompt. SARS rewards this most.",
    "copy": "Nearer to the subject, further from the prompt: towards a copy of the reference.",
    "forgets": "Nearer to the prompt, further from the subject: the subject is being forgotten.",
    "worse": "Further from both.",
    "on the border": "No change to speak of in one of the two.",
    "no difference to speak of": "Pictures of one rollout differ by ten times as much and more.",
}
_CAVEAT = (
    "This is one picture, judged by the rewards of the training. For means over many held-out "
    "pictures, by models that were not trained on: <code>cgrpo evaluate</code>."
)
_UNKNOWN = (
    "Whether that is much cannot be said: how much pictures differ in these rewards stands in the "
    "log of a run, and there is none here."
)
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


def answer(compared: Comparison, objectives: Mapping[str, str]) -> str:
    """What was drawn, its rewards, what could not be scored, and the quadrant."""
    texts = [*compared.base.errors, *(compared.tuned.errors if compared.tuned else ())]
    errors = (error(text) for text in dict.fromkeys(texts))
    return "".join((_caption(compared), _table(compared, objectives), *errors, _verdict(compared)))


def _caption(compared: Comparison) -> str:
    request = compared.request
    words = [f"“{request.example.prompt}”", f"seed {request.seed}"]
    if request.trained is not None:
        words.append(f"weights {request.trained.label}")
        if request.trained.is_lora:
            words.append(f"strength {request.strength:g}")
    return f'<p class="caption">{escape(", ".join(words))}</p>'


def _table(compared: Comparison, objectives: Mapping[str, str]) -> str:
    base, tuned = compared.base.scores, compared.tuned and compared.tuned.scores
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
    return "not scored" if math.isnan(value) else f"{value:{sign}z.3f}"


def _verdict(compared: Comparison) -> str:
    """The quadrant, where both objectives are known."""
    identity, prompt = (compared.change.get(name, math.nan) for name in ("identity", "prompt"))
    if math.isnan(identity + prompt):
        return ""
    numbers = f"identity {identity:+z.3f}, prompt {prompt:+z.3f}"
    spread = compared.spread
    if not spread:
        return f"<p>{numbers}. {_UNKNOWN}</p><p><small>{_CAVEAT}</small></p>"
    changes = {"identity": identity, "prompt": prompt}
    clear = (x if abs(x) >= SLIGHT * spread[name] else 0.0 for name, x in changes.items())
    name = quadrant(*clear)
    return (
        f"<h3>{name.capitalize()}</h3><p>{numbers}: {_WORDS[name]}</p>"
        f"<p><small>{_CAVEAT}</small></p>"
    )


def quadrant(identity: float, prompt: float) -> Quadrant:
    """The quadrant of SARS's plane in which a change from base to tuned lies; 0 is a slight one."""
    if identity == 0 or prompt == 0:
        return "on the border" if identity or prompt else "no difference to speak of"
    if identity > 0:
        return "synergy" if prompt > 0 else "copy"
    return "forgets" if prompt > 0 else "worse"
