"""Prompts to train on, others to watch by, and to judge by, none of whose phrases are trained on.

Three kinds, as in subject-driven benchmarks: a new *context* (place, light, company), a changed
*property* (colour, material, style) and an *accessory*. The embedded model gets prompts of its own
world's grammar, the only sentences it knows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from customized_grpo.data.photos import SHARE
from customized_grpo.data.splits import scattered
from customized_grpo.data.templates import BRACES
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.files import read_text
from customized_grpo.tools.init import grammar

KINDS = ("context", "property", "accessory")
OWN = "own"
FEWEST, MOST = 15, 600
PLACEHOLDER = "{class}"
_ARTICLE = re.compile(rf"\b([Aa])n? {PLACEHOLDER}")
_LONGEST = 400  # characters; the text encoders cut off what is longer

Write = Callable[[str, bool, random.Random], str]
"""A random prompt: kind, whether of the held-out phrases."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A text to make pictures of."""

    kind: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """Disjoint."""

    training: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]


def with_article(words: str) -> str:
    """A dog, an owl, an hourglass, a unicorn."""
    vowel = words.lower().startswith(grammar.VOWELS)
    return f"{'an' if vowel and not words.lower().startswith(grammar.NO_VOWELS) else 'a'} {words}"


def check_class(words: str) -> str:
    """What the subject is called, without an article.

    Raises:
        ConfigError: if it is none.
    """
    name = " ".join(words.split())
    first, _, rest = name.partition(" ")
    if first.lower() in ("a", "an", "the", "my"):
        name = rest
    if not name or len(name) > 60 or not name.isprintable() or not name[0].isalnum():
        raise ConfigError(
            "--class must be a word or a few that say what the photos show, got "
            f"{words[:70]!a}; write for example --class dog, or --class 'plush bear'"
        )
    return name


def draw_prompts(count: int, seed: int, write: Write) -> Prompts:
    """Random prompts, as many of each kind; a fifth of them is held out, a tenth for validation.

    Args:
        count: of all.
        seed: the same one gives the same prompts.
        write: makes one; of disjoint phrases for the two parts.
    """
    words = random.Random(seed)
    parts: dict[bool, dict[str, Prompt]] = {False: {}, True: {}}
    fifth = count // SHARE
    for held_out, number in ((True, fifth), (False, count - fifth)):
        found = parts[held_out]
        while len(found) < number:
            kind = KINDS[len(found) % len(KINDS)]
            text = write(kind, held_out, words)
            found.setdefault(text, Prompt(kind=kind, text=text))
    seen, tenth = tuple(parts[False].values()), _half(fifth)
    held_out = tuple(parts[True].values())
    return Prompts(training=seen[tenth:], validation=seen[:tenth], held_out=held_out)


def _half(count: int) -> int:
    """At least one of any."""
    return -(-count // 2)


def write_plain(words: str, live: bool, kind: str, held_out: bool, random: random.Random) -> str:
    """English for the large models."""

    def pick(phrases: Sequence[str]) -> str:
        return random.choice(_share(phrases, held_out))

    subject, where = with_article(words), pick(grammar.PLACES)
    opening = random.choice(grammar.OPENINGS)
    if kind == "property":
        if random.random() < 0.5:
            return f"{opening}{with_article(f'{pick(grammar.COLORS)} {words}')} {where}"
        return f"{pick(grammar.STYLES).format(subject)} {where}"
    if kind == "accessory":
        return f"{opening}{subject} {pick(grammar.WORN if live else grammar.ADDED)} {where}"
    action = random.choice(("", *grammar.ACTIONS)) if live else ""
    company = pick(grammar.COMPANIONS) if random.random() < 0.4 else ""
    light = "" if company else random.choice(grammar.LIGHTS)
    return " ".join(f"{opening}{subject} {action} {company} {where} {light}".split())


def write_embedded(noun: str, kind: str, held_out: bool, random: random.Random) -> str:
    """A sentence of the emoji world, about one of its nouns."""
    from customized_grpo.data.emoji import world as emoji

    def pick(attribute: str) -> int:
        values = emoji.attribute_values(attribute)
        return values.index(random.choice(_share([v for v in values if v != "none"], held_out)))

    asked = {"context": "prop", "property": "color", "accessory": "accessory"}[kind]
    values = {"prop": 0, "color": 0, "accessory": 0} | {asked: pick(asked)}
    placement = random.randrange(len(emoji.PLACEMENTS))
    numbers = pick("scene"), placement, values["prop"], values["color"], values["accessory"]
    return emoji.write_prompt(noun, numbers, random)


def _share(phrases: Sequence[str], held_out: bool) -> list[str]:
    """The phrases of one part: a fifth, chosen by their letters alone, is for held-out prompts."""
    order = scattered(dict.fromkeys(phrases), str)
    fifth = max(1, len(order) // SHARE)
    return order[:fifth] if held_out else order[fifth:]


def read_prompts(path: Path, words: str) -> Prompts:
    """Your own prompts, one a line. A fifth is held out, a tenth for validation.

    ``{class}`` stands for the class; the article before it becomes the right one.

    Raises:
        DataError: if the file cannot be read, or there are too few in it.
    """
    where = f"--prompts: {path}"
    lines = read_text(path, where).split("\n")
    texts = [_named(line.strip(), words) for line in lines if line.strip()]
    for number, text in enumerate(texts, start=1):
        if mistake := mistake_in(text):
            raise DataError(f"{where}: prompt {number} {mistake}")
        if unknown := BRACES.search(text):
            raise DataError(
                f"{where}: prompt {number} must have no placeholder but {PLACEHOLDER}, got "
                f"{unknown[0]!r}; write {PLACEHOLDER}, or the words that it stands for"
            )
    return split_prompts((Prompt(kind=OWN, text=text) for text in texts), where)


def _named(text: str, words: str) -> str:
    article = with_article(words)[1:]
    return re.sub(_ARTICLE, lambda found: found[1] + article, text).replace(PLACEHOLDER, words)


def mistake_in(text: str) -> str | None:
    """Why a text is no prompt, or None."""
    if len(text) > _LONGEST:
        return f"must have at most {_LONGEST} characters, got {len(text)}; shorten it"
    if not text.isprintable():
        return f"must be printable text on one line, got {text[:60]!a}; write it again"
    return None


def split_prompts(prompts: Iterable[Prompt], where: str) -> Prompts:
    """Holds out a fifth of each kind, chosen by the texts alone, and half as many to validate.

    Raises:
        DataError: if there are fewer than five.
    """
    unique = {prompt.text.lower(): prompt for prompt in prompts}
    kinds: dict[str, list[Prompt]] = {}
    for prompt in unique.values():
        kinds.setdefault(prompt.kind, []).append(prompt)
    orders = [scattered(some, lambda prompt: prompt.text) for some in kinds.values()]
    fifths = [len(order) // SHARE for order in orders]
    held = {p.text for n, order in zip(fifths, orders, strict=True) for p in order[:n]}
    watched = {
        p.text for n, order in zip(fifths, orders, strict=True) for p in order[n : n + _half(n)]
    }
    if len(held) < 2:
        raise DataError(
            f"{where} must hold at least {2 * SHARE} different prompts, got {len(unique)}: a fifth "
            "is held out, to judge by; write more, one a line"
        )
    return Prompts(
        training=tuple(p for p in unique.values() if p.text not in held | watched),
        validation=tuple(p for p in unique.values() if p.text in watched),
        held_out=tuple(p for p in unique.values() if p.text in held),
    )
