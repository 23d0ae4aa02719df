"""From what a user says to a project: all is checked and chosen before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from customized_grpo.errors import ConfigError
from customized_grpo.tools.init import prompts
from customized_grpo.tools.init.llm import Writer
from customized_grpo.tools.init.models import EMBEDDED, choose_model
from customized_grpo.tools.init.photos import Remark, read_album
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
    live: bool | None = None
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
    _check_options(order)
    folder, words = check_new(order.folder), prompts.check_class(order.words)
    model = choose_model(order.model, order.gpu_memory)
    is_embedded = model.name == EMBEDDED
    if is_embedded and order.writer is not None:
        raise ConfigError(
            "--llm must be left out with the embedded model, which knows the sentences of its own "
            "grammar only; take a large model by --model"
        )
    album = read_album(order.photos, model.side, squares=is_embedded)
    live = prompts.is_live(words) if order.live is None else order.live
    called = _embedded_noun(words, live) if is_embedded else words
    return Project(
        folder=folder,
        words=words,
        called=called,
        live=live,
        seed=order.seed,
        model=model,
        album=album,
        prompts=_prompts(order, called, live, is_embedded),
    )


def _check_options(order: Order) -> None:
    if order.prompts is not None:
        given = {
            "--llm": order.writer,
            "--num-prompts": order.num_prompts,
            "--live and --no-live": order.live,
        }
        for flag, value in given.items():
            if value is not None:
                raise ConfigError(f"{flag} must be left out with --prompts, whose lines are taken")
    count = order.num_prompts
    if count is not None and not prompts.FEWEST <= count <= prompts.MOST:
        raise ConfigError(
            f"--num-prompts must be from {prompts.FEWEST} to {prompts.MOST}, got {count}; 60 are "
            "enough for a start"
        )


def _embedded_noun(words: str, live: bool) -> str:
    try:
        from customized_grpo.data.emoji.catalog import known_noun

        return known_noun(words) or ("animal" if live else "toy")
    except ImportError as error:
        raise ConfigError(
            f"--model embedded needs the extra packages ({error}); "
            "pip install 'customized-grpo[emoji]'"
        ) from error


def _prompts(order: Order, called: str, live: bool, is_embedded: bool) -> prompts.Prompts:
    if order.prompts is not None:
        return prompts.read_prompts(order.prompts, called)
    count = DEFAULT_PROMPTS if order.num_prompts is None else order.num_prompts
    if order.writer is not None:
        return order.writer.write(called, live, count)
    writer = prompts.embedded_writer(called) if is_embedded else prompts.plain_writer(called, live)
    return prompts.draw_prompts(count, order.seed, writer)


def remarks_on_prompts(project: Project) -> list[Remark]:
    """What is odd about prompts that a user has written."""
    remarks = []
    if texts := prompts.unnamed(project.prompts, project.called):
        remarks.append(
            f"prompts that do not say {project.called!r}: {len(texts)}, such as {texts[0]!r}; the "
            "model has to guess what in the photo is meant"
        )
    if project.is_embedded and (words := prompts.unknown_words(project.prompts)):
        remarks.append(
            f"the embedded model has never seen these words: {', '.join(words[:12])}"
            f"{', ...' if len(words) > 12 else ''}"
        )
    return [Remark(photo="", kind="prompts", text=text) for text in remarks]
