"""A study's ranking as a Markdown page of its own."""

from __future__ import annotations

from dataclasses import replace
from textwrap import fill

from customized_grpo.errors import ConfigError
from customized_grpo.evaluation.report.tables import ranking
from customized_grpo.evaluation.results import Results

_QUESTION = (
    "Which method makes most pictures right in both: the subject of the reference, doing what the "
    "prompt asks for?"
)


def leaderboard(results: Results, command: str, picture: str = "", about: str = "") -> str:
    """The ranking, what it was measured on, what is missing.

    Args:
        results: of the study.
        command: what writes the page.
        picture: link to the ranking as a figure; "": there is none.
        about: what the study says of its methods.

    Raises:
        ConfigError: if the data do not know what is right.
    """
    table = ranking(results)
    if table is None and results.cells:
        raise ConfigError(
            "--leaderboard must be left out where nothing says what is right (both_right), as in "
            f"{results.name}; report.html compares the scores"
        )
    missing = [label for method, label in results.labels.items() if not results.of(method)]
    measured = "" if table is None else _measured(results)
    paragraphs = [" ".join(filter(None, (_QUESTION, measured, about)))]
    if missing:
        paragraphs.append(f"**Not run yet**: {'; '.join(missing)}.")
    paragraphs.append(
        f"This page is written by `{command}`, which runs what is missing; `--add NAME=OVERRIDES` "
        "puts a method of your own beside these."
    )
    parts = ["# Leaderboard", *map(_wrapped, paragraphs)]
    if table is not None:
        shown = [f"![methods by pictures right in both]({picture})"] if picture else []
        parts[2:2] = [*shown, replace(table, title="").markdown(), _wrapped(table.note)]
    return "\n\n".join(parts) + "\n"


def _measured(results: Results) -> str:
    machines = dict.fromkeys(
        f"{cell.environment['device']} (threads: {cell.environment['threads']})"
        for cell in results.cells
    )
    return (
        f"Measured on {results.yardstick.describe()} by models that nothing was trained on: the "
        "mean over the seeds ± half of the 95 % confidence interval (Student's t). Trained on "
        f"{'; '.join(machines)}."
    )


def _wrapped(text: str) -> str:
    return fill(text, 100, break_long_words=False, break_on_hyphens=False)
