"""The configuration of a study: methods that share everything but a few fields, over seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from customized_grpo.config.decoding import show
from customized_grpo.config.limits import Count, FilePath
from customized_grpo.config.names import TAKEN
from customized_grpo.config.sections import FileName, RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to train, as the fields in which it differs from the study's config."""

    name: FileName
    """Folder of its runs; letters, digits, dot, underscore and hyphen."""

    label: str
    """What tables and figures call it."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Field of the config -> value, dotted as on the command line: {advantage.center: true}."""

    num_seeds: Count | None = None
    """Runs of this method, seeds 0, 1, ...; null = the study's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """Methods x seeds; every method sees the same base, data, noise and budget."""

    name: FileName
    """Folder of the study under output_dir."""

    config: FilePath
    """Config of the runs, relative to the study's file."""

    output_dir: FilePath = "runs"
    """Folder that holds the study's folder."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields that differ from that config in all runs: {train.num_updates: 100}."""

    split: Literal["held_out", "validation"] = "held_out"
    """Examples the runs are judged on; recipes are chosen on the validation ones."""

    num_seeds: Count = 3
    """Runs of each method, seeds 0, 1, ...; one seed has no confidence interval."""

    methods: Annotated[tuple[Method, ...], Field(min_length=1)]
    """What is compared, in the order of the tables."""

    main: str
    """Name of the method that the others are compared with, seed by seed."""

    about: str = ""
    """What a reader of its leaderboard has to know of the methods, in a sentence or two."""

    def cells(self) -> list[tuple[Method, int]]:
        """All (method, seed), those of the methods with most seeds first, seed by seed.

        So an unfinished study has what matters most, and whole seeds of it.
        """
        cells = [(method, seed) for method in self.methods for seed in range(self.seeds_of(method))]
        return sorted(cells, key=lambda cell: (-self.seeds_of(cell[0]), cell[1]))

    def seeds_of(self, method: Method) -> int:
        """How often a method is run."""
        return self.num_seeds if method.num_seeds is None else method.num_seeds

    def flags(self, method: Method) -> list[str]:
        """Command-line overrides of a method's runs."""
        fields = self.overrides | method.overrides
        return [word for name, value in fields.items() for word in (f"--{name}", *_words(value))]

    @property
    def folder(self) -> Path:
        """Where the study's runs lie."""
        return Path(self.output_dir) / self.name

    def place(self, config: RunConfig, method: Method, seed: int) -> RunConfig:
        """The config of one run, in its folder ``FOLDER/METHOD/seedN``."""
        folder = str(self.folder / method.name)
        return replace(config, name=f"seed{seed}", output_dir=folder, seed=seed)


# Folders and files in a study's folder, and pictures beside those of its methods.
_RESERVED = ("figures", "pictures", "results.json", "tables.md", "report.html")
_RESERVED += ("base", "reference", "ground-truth")
_PLACED = ("name", "seed", "output_dir")


def mistakes(study: StudyConfig) -> Iterator[str]:
    """Yields a line for every field that cannot be as it is."""
    for i, method in enumerate(study.methods):
        before = study.methods[:i]
        for field_, value in (("name", method.name), ("label", method.label)):
            if value in (getattr(m, field_) for m in before):
                yield f"methods.{i}.{field_} must be unique, got {value!r} twice"
        if method.label in TAKEN:
            yield (
                f"methods.{i}.label must not be {method.label!r}, as reports call the base, the "
                "reference or an anchor; choose another"
            )
        if method.name in _RESERVED:
            yield f"methods.{i}.name must not be {method.name!r}, which the study itself uses"
    overrides = {"overrides": study.overrides}
    overrides |= {f"methods.{i}.overrides": m.overrides for i, m in enumerate(study.methods)}
    for where, fields in overrides.items():
        for name in fields:
            if name.replace("-", "_") in _PLACED:
                yield f"{where} must not have {name}, which the study sets for every run"


def first_difference(one: RunConfig, other: RunConfig) -> str | None:
    """The first field in which two configs have another base, other examples or other judges."""

    def compared(c: RunConfig) -> dict[str, Any]:
        names = ("data", "rewards", "evaluators", "mixed_precision")
        return {
            "generator": c.evaluated().generator,
            **{name: getattr(c, name) for name in names},
            "rollout.shift": c.rollout.shift,
            "rollout.num_steps": c.evaluation.num_steps or c.rollout.num_steps,
            "evaluation.seed": c.evaluation.seed,
            "evaluation.classifier": c.evaluation.classifier,
            "evaluation.num_examples": c.evaluation.num_examples,
        }

    fields = compared(other)
    return next((name for name, value in compared(one).items() if value != fields[name]), None)


def _words(value: Any) -> list[str]:
    """A value as the words of the command line: a list of plain items is several, or `[]`."""
    items = value if isinstance(value, list) else []
    if items and not any(isinstance(item, (dict, list)) for item in items):
        return [word for item in items for word in _words(item)]
    return [value if isinstance(value, str) else show(value, limit=None)]
