"""Prompts: three kinds, different, of disjoint phrases, in words that the model knows."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from customized_grpo.data.emoji import world as emoji
from customized_grpo.data.emoji.catalog import known_noun
from customized_grpo.data.splits import scattered
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.tools.init import grammar
from customized_grpo.tools.init.prompts import (
    KINDS,
    MOST,
    Prompts,
    Write,
    check_class,
    draw_prompts,
    read_prompts,
    split_prompts,
    with_article,
    write_embedded,
    write_plain,
)

WRITERS = {
    "live": partial(write_plain, "dog", True),
    "thing": partial(write_plain, "orange mug", False),
    "embedded": partial(write_embedded, "animal"),
}
each = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def texts(prompts: Prompts) -> tuple[list[str], list[str]]:
    """What is trained on or validated by, and what is held out."""
    shown = [p.text for p in (*prompts.training, *prompts.validation)]
    return shown, [p.text for p in prompts.held_out]


@each
def test_the_kinds_are_shared_equally_and_a_fifth_is_held_out(write: Write) -> None:
    prompts = draw_prompts(60, 0, write)
    everything = [*prompts.training, *prompts.validation, *prompts.held_out]
    for split in (prompts, split_prompts(everything, "here")):
        assert Counter(p.kind for p in split.training) == dict.fromkeys(KINDS, 14)
        assert Counter(p.kind for p in split.validation) == dict.fromkeys(KINDS, 2)
        assert Counter(p.kind for p in split.held_out) == dict.fromkeys(KINDS, 4)
        parts = split.training, split.validation, split.held_out
        assert {p.text for part in parts for p in part} == {p.text for p in everything}


@each
def test_all_differ_and_depend_on_the_seed_alone(write: Write) -> None:
    prompts = draw_prompts(MOST, 1, write)
    assert len({text for part in texts(prompts) for text in part}) == MOST
    assert draw_prompts(MOST, 1, write) == prompts
    assert draw_prompts(MOST, 2, write) != prompts


def phrases_in(texts: list[str], phrases: tuple[str, ...]) -> set[str]:
    return {phrase for phrase in phrases for text in texts if phrase.format("") in text}


@pytest.mark.parametrize(
    ("writer", "phrases"),
    [
        ("live", grammar.PLACES),
        ("live", grammar.WORN),
        ("live", grammar.COMPANIONS),
        ("thing", grammar.ADDED),
        ("embedded", tuple(emoji.SCENES)),
        ("embedded", tuple(emoji.PROPS)),
        ("embedded", tuple(emoji.ACCESSORIES)),
    ],
)
def test_what_held_out_prompts_ask_for_is_never_trained_on(writer: str, phrases) -> None:
    training, held_out = texts(draw_prompts(MOST, 0, WRITERS[writer]))
    kept = set(scattered(phrases, str)[: len(phrases) // 5])
    assert phrases_in(held_out, phrases) == kept
    assert phrases_in(training, phrases) == set(phrases) - kept


def test_what_is_alive_wears_and_a_thing_is_decorated() -> None:
    for writer, named, worn in (("live", "a dog", True), ("thing", "n orange mug", False)):
        prompts = draw_prompts(MOST, 0, WRITERS[writer])
        everything = [*prompts.training, *prompts.validation, *prompts.held_out]
        accessories = [p.text for p in everything if p.kind == "accessory"]
        assert all(("wearing" in t or "dressed" in t) is worn for t in accessories)
        assert all(named in p.text for p in everything if p.kind != "property")
        assert all("a orange" not in p.text and "  " not in p.text for p in everything)


def test_the_embedded_model_has_seen_every_word() -> None:
    prompts = draw_prompts(MOST, 0, WRITERS["embedded"])
    known = set(emoji.all_words())
    everything = [text for part in texts(prompts) for text in part]
    words = {word for text in everything for word in text.replace(",", " ,").split()}
    assert words <= known


@pytest.mark.parametrize(
    ("words", "noun"),
    [
        ("dog", "animal"),
        ("cat", "cat"),
        ("plush bear", "animal"),
        ("Teapot", "drink"),
        ("red toy", "toy"),
        ("flibbertigibbet", None),
    ],
)
def test_a_class_becomes_a_noun_of_the_emoji_world(words: str, noun: str | None) -> None:
    assert known_noun(words) == noun
    assert noun is None or noun in emoji.all_words()


def test_the_class_loses_its_article_and_gets_the_right_one() -> None:
    assert check_class("  my  old   dog ") == "old dog"
    assert check_class("theatre mask") == "theatre mask"
    names = ("dog", "owl", "Apple", "hourglass", "horse", "unicorn", "umbrella", "used book")
    articles = [with_article(name).split()[0] for name in names]
    assert articles == ["a", "an", "an", "an", "a", "a", "an", "a"]


@pytest.mark.parametrize("words", ["", "the", "a", "--dog", "x" * 61, "a\adog", "\ud800"])
def test_what_is_no_class(words: str) -> None:
    with pytest.raises(ConfigError, match="--class must be"):
        check_class(words)


def test_own_prompts_are_taken_and_split(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    lines = [f"a {{class}} beside {n} cups" for n in range(10)]
    file.write_text("\n".join([*lines, "", lines[0].upper().replace("CLASS", "class"), ""]))
    prompts = read_prompts(file, "dog")
    training, held_out = texts(prompts)
    assert (len(prompts.validation), len(held_out)) == (1, 2)
    assert sorted(training + held_out)[1:] == sorted(f"a dog beside {n} cups" for n in range(1, 10))
    assert {p.kind for p in prompts.training} == {"own"}


def test_own_prompts_get_the_right_article(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    lines = ["A {class} at sea", "by an {class}", "banana {class}", "the {class}s"]
    lines.append("a fine {class}")
    file.write_bytes("\ufeff".encode() + "\n".join([*lines, *"abcdefgh"]).encode())
    training, held_out = texts(read_prompts(file, "owl"))
    wanted = {"An owl at sea", "by an owl", "banana owl", "the owls", "a fine owl"}
    assert wanted <= {*training, *held_out}
    training, held_out = texts(read_prompts(file, "dog"))
    assert {"A dog at sea", "by a dog", "banana dog"} <= {*training, *held_out}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a {class}\n" * 9, "at least 10 different prompts, got 1"),
        ("a dog\n" + "b" * 401, "prompt 2 must have at most 400 characters, got 401"),
        ("a\tdog", "prompt 1 must be printable"),
        ("a {Class} at sea", "prompt 1 must have no placeholder but {class}, got '{Class}'; write"),
    ],
)
def test_own_prompts_that_are_none(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=says):
        read_prompts(file, "dog")
    with pytest.raises(DataError, match=r"--prompts: .*nothing.txt: cannot be read"):
        read_prompts(tmp_path / "nothing.txt", "dog")
