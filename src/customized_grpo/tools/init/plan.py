"""From what a user says to a project: all is checked and chosen before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from customized_grpo.errors import ConfigError, needs_extra
from customized_grpo.tools.init import prompts
from customized_grpo.tools.init.llm import Writer
from customized_grpo.tools.init.models import EMBEDDED, choose_preset
from customized_grpo.tools.init.photos import read_album
from customized_grpo.tools.init.project import Project, check_new

DEFAULT_PROMPTS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What a project is to be made of; None: chosen here."""

    folder: Path
    photos: Path
    words: str
    """The class, such as dog."""
    model: str | None = None
    gpu_memory: float | None = None
    """GB."""
    live: bool = False
    """Whether it is a person or an animal."""
    prompts: Path | None = None
    """Text file with one a line, instead of ours."""
    writer: Writer | None = None
    """A language model that writes them, instead of us."""
    num_prompts: int | None = None
    seed: int = 0


def plan_project(order: Order) -> Project:
    """Checks the photos, chooses the model and writes the prompts; nothing is on the disk yet.

    Raises:
        ConfigError: if options contradict each other, or the folder is not new.
        DataError: if photos or prompts cannot be used.
    """
    folder, words = check_new(order.folder), prompts.check_class(order.words)
    preset = choose_preset(order.model, order.gpu_memory)
    is_embedded = preset.name == EMBEDDED
    _check_options(order, is_embedded)
    album = read_album(order.photos, preset.side, squares=is_embedded)
    called = _embedded_noun(words, order.live) if is_embedded else words
    return Project(
        folder=folder,
        words=words,
        called=called,
        live=order.live,
        seed=order.seed,
        preset=preset,
        album=album,
        prompts=_prompts(order, called, is_embedded),
    )


def _check_options(order: Order, is_embedded: bool) -> None:
    if order.prompts is not None:
        named_by_it = order.live and not is_embedded  # which does not know every class
        flags = {"--llm": order.writer, "--num-prompts": order.num_prompts, "--live": named_by_it}
        for flag, value in flags.items():
            if value:
                raise ConfigError(f"{flag} must be left out with --prompts, whose lines are taken")
    if is_embedded and order.writer is not None:
        raise ConfigError(
            "--llm must be left out with the embedded model, which knows the sentences of its own "
            "grammar only; take a large model by --model"
        )
    count = order.num_prompts
    if count is not None and not prompts.FEWEST <= count <= prompts.MOST:
        raise ConfigError(
            f"--num-prompts must be from {prompts.FEWEST} to {prompts.MOST}, got {count}; 60 are "
            "enough for a start"
        )


def _embedded_noun(words: str, live: bool) -> str:
    with needs_extra("emoji", "--model embedded"):
        from customized_grpo.data.emoji.catalog import known_noun

        return known_noun(words) or ("animal" if live else "toy")


def _prompts(order: Order, called: str, is_embedded: bool) -> prompts.Prompts:
    if order.prompts is not None:
        return prompts.read_prompts(order.prompts, called)
    count = DEFAULT_PROMPTS if order.num_prompts is None else order.num_prompts
    if order.writer is not None:
        return order.writer.write(called, order.live, count)
    if is_embedded:
        write = partial(prompts.write_embedded, called)
    else:
        write = partial(prompts.write_plain, called, order.live)
    return prompts.draw_prompts(count, order.seed, write)
