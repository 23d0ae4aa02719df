"""The picture of a demo: a run's base and tuned with pictures kept from a study between them.

What is kept of a model is a strip of its pictures and what is needed to see that they are of the
same examples, and which of them are wrong: ``NAME.png`` and ``NAME.json``. ``naive`` comes with
the package (``scripts/keep_pictures.py``).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from customized_grpo.assets import embedded_file
from customized_grpo.config.names import BASE, REFERENCE
from customized_grpo.errors import ConfigError
from customized_grpo.evaluation.evaluate import NUM_SHOWN, Place
from customized_grpo.evaluation.marks import marks
from customized_grpo.evaluation.outcome import TUNED, Judgement, Outcome, Yardstick, read_json
from customized_grpo.evaluation.results import Results
from customized_grpo.files import write_atomic
from customized_grpo.pictures import read_strip, save_grid, save_strip
from customized_grpo.rewards.truth import SHARES
from customized_grpo.types import Example

NAIVE = embedded_file("naive")
"""Naive GRPO 1:1, from the proof."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is known of the pictures of a strip."""

    label: str
    set: str
    """The split that the examples are the first ones of."""
    examples: list[tuple[str, str]]
    """Subject and prompt of each."""
    judgement: Judgement
    """Shares of right pictures, without the rest."""


def keep(results: Results, folder: Path, method: str, target: Path) -> None:
    """Writes ``target.png`` and ``target.json`` of a study's method, seed 0.

    ``folder`` is that of the study's results, which has the strips.
    """
    cell, yardstick = results.of(method).get(0), results.yardstick
    if cell is None:
        raise ConfigError(f"method must be one of {', '.join(results.methods)}, got {method!r}")
    examples, columns = _examples(yardstick), cell.judgement.columns
    known = {name: columns[name][: len(examples)] for name in SHARES if name in columns}
    kept = Kept(
        label=results.labels[method],
        set=yardstick.set,
        examples=examples,
        judgement=Judgement(columns=known),
    )
    images = read_strip(folder / "pictures" / f"{method}.png", len(examples))
    save_strip(target.with_suffix(".png"), images)
    text = json.dumps(asdict(kept), ensure_ascii=False, indent=1)
    write_atomic(target.with_suffix(".json"), text + "\n")


def save_hero(path: Path, run: Path, heading: str, kept: Path = NAIVE) -> None:
    """Writes reference | prompt | base | what is kept | the run: its first held-out examples.

    Args:
        path: of the PNG.
        run: folder of an evaluated run.
        heading: what the run's pictures are called.
        kept: what ``keep`` wrote, without its suffix.

    Raises:
        CheckpointError: if the run has not been evaluated, or nothing is kept.
        ConfigError: if the kept pictures are of other examples.
    """
    place = Place(run, "held_out")
    outcome = Outcome.read(place.json)
    file = kept.with_suffix(".json")
    other = read_json(Kept, file, "what is known of pictures", "make it by keep_pictures.py")
    examples = _examples(outcome.yardstick)
    if (other.set, other.examples) != (outcome.yardstick.set, examples):
        raise ConfigError(
            f"{file}: must be of the first examples of {run}, got other ones; give a run of the "
            "data that the study was of"
        )
    judged = {BASE: outcome.yardstick.base, other.label: other.judgement, heading: outcome.own}
    strips = {BASE: place.strip(BASE), other.label: kept.with_suffix(".png")}
    strips[heading] = place.strip(TUNED)
    count = len(examples)
    references = read_strip(place.strip(REFERENCE), count)
    save_grid(
        path,
        [
            Example(id=str(row), prompt=prompt, references=(references[row],), subject=subject)
            for row, (subject, prompt) in enumerate(examples)
        ],
        {head: read_strip(strip, count) for head, strip in strips.items()},
        marks={head: marks(model, count) for head, model in judged.items() if model is not None},
    )


def _examples(yardstick: Yardstick) -> list[tuple[str, str]]:
    return [(item.subject, item.prompt) for item in yardstick.items[:NUM_SHOWN]]
