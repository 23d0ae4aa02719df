"""Base against tuned on examples not trained on: deterministic sampling, fixed noise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from customized_grpo.checkpoint import write_atomic
from customized_grpo.config import load_config
from customized_grpo.errors import CheckpointError, ConfigError, within
from customized_grpo.report.grid import save_grid
from customized_grpo.rewards.base import RewardSet
from customized_grpo.rollout import FixedSampler, pick_device
from customized_grpo.trainer import WEIGHTS, build_world
from customized_grpo.types import Example

_PICTURE_ROWS = 10
Split = Literal["held_out", "validation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """Scores of every model by every evaluator."""

    scores: dict[str, dict[str, list[float]]]
    """Model -> evaluator -> one score per example, in their order."""
    objectives: dict[str, str]
    """Evaluator -> the objective it measures."""
    split: Split
    picture: Path

    def change(self, evaluator: str) -> tuple[float, float]:
        """Mean paired difference tuned - base and its standard error over the examples."""
        tuned, base = (torch.tensor(self.scores[m][evaluator]) for m in ("tuned", "base"))
        difference = tuned - base
        return difference.mean().item(), (difference.std() / len(difference) ** 0.5).item()

    def table(self) -> str:
        """Plain text: a row per model, a column per evaluator, the change with its error below."""
        names = list(self.objectives)
        heads = [f"{self.objectives[name]} ({name})" for name in names]
        width = max(24, *(len(head) + 2 for head in heads))
        lines = ["".join([" " * 22, *(head.rjust(width) for head in heads)])]
        for model, scores in self.scores.items():
            cells = (f"{torch.tensor(scores[name]).mean().item():.4f}" for name in names)
            lines.append("".join([model.ljust(22), *(cell.rjust(width) for cell in cells)]))
        changes = (self.change(name) for name in names)
        cells = (f"{mean:+.4f} +- {error:.4f}" for mean, error in changes)
        lines.append("".join(["tuned - base".ljust(22), *(cell.rjust(width) for cell in cells)]))
        count = len(next(iter(self.scores["base"].values())))
        split = self.split.replace("_", "-")
        lines.append(f"{count} {split} examples; +- is the standard error of the paired difference")
        return "\n".join(lines)


def evaluate_run(
    run: Path, split: Split = "held_out", num_examples: int | None = None
) -> EvaluationReport:
    """Evaluates a finished run; writes ``evaluation.json`` and ``evaluation.png`` into its folder.

    On the validation split, the files are called ``validation``: recipes are chosen there, so that
    the held-out examples stay unseen by the person too. ``num_examples`` None: as many as the run's
    config says.

    Raises:
        CheckpointError: if the folder is not a finished run.
        ConfigError: if the run's config names no evaluators, or ``num_examples`` is below 2.
    """
    for needed in ("config.yaml", WEIGHTS):
        if not (run / needed).exists():
            raise CheckpointError(
                f"RUN: {run} must be the folder of a finished run, {needed} is missing in it"
            )
    config = load_config(run / "config.yaml")
    if not config.evaluators:
        raise ConfigError(f"evaluators: {run / 'config.yaml'} names none; add the models to use")
    count = config.evaluation.num_examples if num_examples is None else num_examples
    if count < 2:
        raise ConfigError(
            f"num_examples must be at least 2 for an error bar, got {count}; 128 is a good start"
        )
    device = pick_device(config.device)
    data, generator = build_world(config, device)
    evaluators = RewardSet(config.evaluators, device, "evaluators")
    with within("data"):
        pick = data.held_out if split == "held_out" else data.validation
        examples = pick(count)
    name = "evaluation" if split == "held_out" else split
    images = {"copy of the reference": torch.stack([e.references[0] for e in examples])}
    if examples[0].target is not None:
        images["ground truth"] = torch.stack([e.target for e in examples if e.target is not None])
    sample = FixedSampler(generator, config, examples)
    images["base"] = sample()
    generator.load_weights(run / WEIGHTS)
    images["tuned"] = sample()
    report = EvaluationReport(
        scores={m: _scores(evaluators, pictures, examples) for m, pictures in images.items()},
        objectives={c.label: c.objective for c in config.evaluators},
        split=split,
        picture=run / f"{name}.png",
    )
    columns = {model: images[model][:_PICTURE_ROWS] for model in ("base", "tuned")}
    save_grid(report.picture, examples[:_PICTURE_ROWS], columns)
    write_atomic(run / f"{name}.json", json.dumps(report.scores) + "\n")
    return report


def _scores(
    evaluators: RewardSet, images: Tensor, examples: list[Example]
) -> dict[str, list[float]]:
    scores = evaluators.score(images.to(torch.float32), examples)
    return {name: scores.scores[:, i].tolist() for i, name in enumerate(scores.names)}
