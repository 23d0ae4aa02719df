"""Base against tuned on examples not trained on: deterministic sampling, fixed noise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from customized_grpo.checkpoint import write_atomic
from customized_grpo.config import RunConfig, load_config
from customized_grpo.errors import CheckpointError, ConfigError, within
from customized_grpo.generators.lora import trust_autocast
from customized_grpo.judge import Judge
from customized_grpo.measures import hypervolume, joint_rates, standard_error
from customized_grpo.report.grid import save_grid, save_strip
from customized_grpo.results import BASE, CHANCE, COPY, TRUTH
from customized_grpo.rollout import FixedSampler, pick_device
from customized_grpo.trainer import WEIGHTS, build_world
from customized_grpo.types import Example, Judgement

_PICTURE_ROWS = 10
_VARIANTS, _VARIED_EXAMPLES = 4, 64  # for the diversity
Split = Literal["held_out", "validation"]


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """Scores of every model by every evaluator, and further measures."""

    models: dict[str, Judgement]
    """What is judged: the anchors (the reference itself, the ground truth, the ground truth of
    another example, which fits nothing), base and tuned."""
    objectives: dict[str, str]
    """Evaluator -> the objective it measures."""
    split: Split
    prompts: list[str]
    """Of the examples in the pictures."""
    picture: Path | None = None

    @property
    def count(self) -> int:
        """Examples."""
        return len(next(iter(self.models.values())).column(self.pair[0]))

    @cached_property
    def pair(self) -> tuple[str, str]:
        """The first evaluator of the prompt and the first of the identity."""
        first = {objective: name for name, objective in reversed(self.objectives.items())}
        return first["prompt"], first["identity"]

    def change(self, column: str) -> tuple[float, float]:
        """Mean paired difference tuned - base and its standard error over the examples."""
        tuned, base = (self.models[m].column(column) for m in ("tuned", "base"))
        return (tuned - base).nanmean().item(), standard_error(tuned - base)

    def joint_rates(self) -> tuple[float, float]:
        """Joint domination and joint collapse rate of tuned against base, by all evaluators."""
        tuned, base = (
            torch.stack([self.models[m].column(name) for name in self.objectives], 1)
            for m in ("tuned", "base")
        )
        return joint_rates(tuned, base)

    def point(self, model: str) -> tuple[float, float]:
        """(prompt, identity) of a model."""
        prompt, identity = (self.models[model].means[name] for name in self.pair)
        return prompt, identity

    def hypervolume(self, model: str) -> float:
        """Of one model above the scores that a picture gets which fits nothing."""
        return hypervolume([self.point(model)], self.point(CHANCE))

    def table(self) -> str:
        """Plain text: a row per measure, a column per model, the paired change with its error."""
        columns = list(self.models)
        names = list(dict.fromkeys(n for m in self.models.values() for n in (*m.means, *m.numbers)))
        heads = {name: f"{o} ({name})" for name, o in self.objectives.items()}
        width = max(len(heads.get(name, name)) for name in names) + 2
        lines = ["".join([" " * width, *(f"{c:>13}" for c in columns), f"{'tuned - base':>20}"])]
        for name in names:
            values = [(m.means | m.numbers).get(name) for m in self.models.values()]
            cells = ["" if v is None else f"{v:.4f}" for v in values]
            change = ""
            if name in self.models["tuned"].means:
                mean, error = self.change(name)
                change = f"{mean:+.4f} +- {error:.4f}"
            row = [heads.get(name, name).ljust(width), *(f"{c:>13}" for c in cells)]
            lines.append("".join([*row, f"{change:>20}"]))
        return "\n".join([*lines, *self._closing_lines()])

    def _closing_lines(self) -> list[str]:
        domination, collapse = self.joint_rates()
        split = self.split.replace("_", "-")
        lines = []
        if CHANCE in self.models:
            volumes = (f"{m} {self.hypervolume(m):.4f}" for m in ("base", "tuned"))
            lines.append(f"hypervolume: {', '.join(volumes)}")
        return [
            *lines,
            f"tuned is better than base on every objective for {domination:.1%} of the examples, "
            f"worse on every one for {collapse:.1%}",
            f"{self.count} {split} examples; +- is the standard error of the paired difference",
        ]

    def to_json(self) -> str:
        """What ``evaluation.json`` holds."""
        models = {name: asdict(judgement) for name, judgement in self.models.items()}
        content = {
            "split": self.split,
            "objectives": self.objectives,
            "prompts": self.prompts,
            "models": models,
        }
        return json.dumps(content) + "\n"

    @classmethod
    def read(cls, file: Path) -> EvaluationReport:
        """Reads what ``to_json`` wrote.

        Raises:
            CheckpointError: if the file is missing or is no evaluation.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            models = {name: Judgement(**fields) for name, fields in content["models"].items()}
            return cls(**{**content, "models": models})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file}: must be the result of an evaluation, cannot be read ({error!r}); "
                "run cgrpo evaluate"
            ) from error


def evaluate_run(
    run: Path,
    split: Split = "held_out",
    num_examples: int | None = None,
    known: Mapping[str, Judgement] | None = None,
) -> EvaluationReport:
    """Evaluates a finished run; writes ``evaluation.json`` and pictures into its folder.

    On the validation split, the files are called ``validation``: recipes are chosen there, so that
    the held-out examples stay unseen by the person too. ``num_examples`` None: as many as the run's
    config says. ``known``: judgements of anchors and base by the same evaluators on the same
    examples, which are then not made again.

    Raises:
        CheckpointError: if the folder is not a finished run.
        ConfigError: if the run's config names no evaluators, or ``num_examples`` is below 2.
    """
    for needed in ("config.yaml", WEIGHTS):
        if not (run / needed).exists():
            raise CheckpointError(
                f"RUN: {run} must be the folder of a finished run, {needed} is missing in it"
            )
    evaluation = Evaluation(load_config(run / "config.yaml"), split, num_examples)
    models = dict(evaluation.baselines() if known is None else known)
    base = evaluation.pictures()
    evaluation.load(run / WEIGHTS)
    models["tuned"] = evaluation.judge_generator()
    tuned = evaluation.pictures()
    file = run / evaluation_file(split)
    report = evaluation.report(models, picture=file.with_suffix(".png"))
    shown = evaluation.examples[:_PICTURE_ROWS]
    save_grid(file.with_suffix(".png"), shown, {"base": base, "tuned": tuned})
    strips = evaluation.truth() | {BASE: base, "tuned": tuned}
    for strip, images in strips.items():
        save_strip(run / "pictures" / f"{strip}.png", images)
    write_atomic(file, report.to_json())
    return report


def evaluation_file(split: Split) -> str:
    """Where a run keeps its evaluation on a split."""
    return "evaluation.json" if split == "held_out" else f"{split}.json"


def judge_baselines(config: RunConfig, split: Split, folder: Path) -> None:
    """Writes ``evaluation.json`` of base and anchors alone, and strips of their pictures."""
    evaluation = Evaluation(config, split)
    report = evaluation.report(evaluation.baselines())
    for name, images in (evaluation.truth() | {BASE: evaluation.pictures()}).items():
        save_strip(folder / f"{name}.png", images)
    write_atomic(folder / "evaluation.json", report.to_json())


class Evaluation:
    """The examples, the generator and the judge of an evaluation."""

    def __init__(self, config: RunConfig, split: Split, num_examples: int | None = None) -> None:
        if not config.evaluators:
            raise ConfigError(f"evaluators: run {config.name!r} names none; add the models to use")
        count = config.evaluation.num_examples if num_examples is None else num_examples
        if count < 2:
            raise ConfigError(
                f"num_examples must be at least 2 for an error bar, got {count}; 128 is a good "
                "start"
            )
        self.config = config
        self.split: Split = split
        device = pick_device(config.device)
        data, self.generator = build_world(config, device)
        with within("data"):
            pick = data.held_out if split == "held_out" else data.validation
            self.examples = pick(count)
        self.judge = Judge(config, self.examples, device)

    def baselines(self) -> dict[str, Judgement]:
        """Anchors, and the generator as it is now, the base."""
        models = {COPY: self.judge(torch.stack([e.references[0] for e in self.examples]))}
        truth = [e.target for e in self.examples if e.target is not None]
        if len(truth) == len(self.examples):
            models[TRUTH] = self.judge(torch.stack(truth))
            models[CHANCE] = self.judge(torch.stack(truth).roll(1, 0))
        return models | {BASE: self.judge_generator()}

    def report(self, models: dict[str, Judgement], picture: Path | None = None) -> EvaluationReport:
        """Puts judgements together."""
        return EvaluationReport(
            models=models,
            objectives=self.judge.objectives,
            split=self.split,
            prompts=[example.prompt for example in self.examples[:_PICTURE_ROWS]],
            picture=picture,
        )

    def load(self, weights: Path) -> None:
        """Puts trained weights into the generator."""
        self.generator.load_weights(weights)
        if self.config.mixed_precision == "bf16":
            trust_autocast(self.generator.transformer)

    def judge_generator(self) -> Judgement:
        """The generator as it is now."""
        varied = self.examples[:_VARIED_EXAMPLES]
        variants = [self._sample(varied, variant) for variant in range(1, _VARIANTS)]
        return self.judge(self._sample(self.examples), variants)

    def truth(self) -> dict[str, Tensor]:
        """References and, if known, targets of the examples that are shown."""
        shown = self.examples[:_PICTURE_ROWS]
        strips = {"reference": torch.stack([e.references[0] for e in shown])}
        targets = [e.target for e in shown if e.target is not None]
        return strips | ({"ground-truth": torch.stack(targets)} if targets else {})

    def pictures(self) -> Tensor:
        """Of the first few examples, chosen by their position alone."""
        return self._sample(self.examples[:_PICTURE_ROWS])

    def _sample(self, examples: list[Example], variant: int = 0) -> Tensor:
        return FixedSampler(self.generator, self.config, examples, variant)()
