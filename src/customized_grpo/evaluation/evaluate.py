"""Base against tuned on examples not trained on: deterministic sampling, fixed noise."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from customized_grpo.config import RunConfig, load_config
from customized_grpo.devices import pick_device
from customized_grpo.errors import CheckpointError, ConfigError, within
from customized_grpo.evaluation.judge import Judge
from customized_grpo.evaluation.measures import standard_error
from customized_grpo.evaluation.results import BASE, Split, Yardstick
from customized_grpo.files import write_atomic
from customized_grpo.generators.cache import CachedEncoder
from customized_grpo.pictures import save_grid, save_strip
from customized_grpo.runs.checkpoint import trained_weights
from customized_grpo.training.build import build_world, load_trained
from customized_grpo.training.sampling import FixedSampler
from customized_grpo.types import Example, Judgement

_PICTURE_ROWS = 10
_VARIANTS, _VARIED_EXAMPLES = 4, 64  # for the diversity
TUNED = "tuned"


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """A tuned generator against anchors and base."""

    yardstick: Yardstick
    tuned: Judgement
    picture: Path | None = None

    @property
    def models(self) -> dict[str, Judgement]:
        """Anchors, base and tuned."""
        return self.yardstick.models | {TUNED: self.tuned}

    def change(self, column: str) -> tuple[float, float]:
        """Mean paired difference tuned - base and its standard error over the examples."""
        difference = self.tuned.column(column) - self.yardstick.base.column(column)
        return difference.nanmean().item(), standard_error(difference)

    def table(self) -> str:
        """Plain text: a row per measure, a column per model, the paired change with its error."""
        columns = {name: self.yardstick.values(judged) for name, judged in self.models.items()}
        names = list(dict.fromkeys(name for values in columns.values() for name in values))
        heads = {name: f"{o} ({name})" for name, o in self.yardstick.objectives.items()}
        width = max(len(heads.get(name, name)) for name in names) + 2
        lines = ["".join([" " * width, *(f"{c:>13}" for c in columns), f"{'tuned - base':>20}"])]
        for name in names:
            numbers = [values.get(name) for values in columns.values()]
            cells = ["" if n is None else f"{n:.4f}" for n in numbers]
            change = ""
            if name in self.tuned.columns:
                mean, error = self.change(name)
                change = f"{mean:+.4f} +- {error:.4f}"
            row = [heads.get(name, name).ljust(width), *(f"{c:>13}" for c in cells)]
            lines.append("".join([*row, f"{change:>20}"]))
        count = self.yardstick.describe()
        lines.append(f"{count}; +- is the standard error of the paired difference")
        return "\n".join(lines)

    def to_json(self) -> str:
        """What ``evaluation.json`` holds."""
        content = asdict(self.yardstick)
        content["models"][TUNED] = asdict(self.tuned)
        return json.dumps(content) + "\n"

    @classmethod
    def read(cls, file: Path) -> EvaluationReport:
        """Reads what ``to_json`` wrote.

        Raises:
            CheckpointError: if the file is missing or is no evaluation of a run.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            models = {name: Judgement(**fields) for name, fields in content["models"].items()}
            tuned = models.pop(TUNED)
            return cls(yardstick=Yardstick(**{**content, "models": models}), tuned=tuned)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file}: must be the result of an evaluation, cannot be read ({error!r}); "
                "run cgrpo evaluate"
            ) from error


def evaluate_run(
    run: Path,
    split: Split = "held_out",
    num_examples: int | None = None,
    known: Yardstick | None = None,
) -> EvaluationReport:
    """Evaluates a run; writes ``evaluation.json`` and pictures into its folder.

    On the validation split, the files are called ``validation``: recipes are chosen there, so that
    the held-out examples stay unseen by the person too. ``num_examples`` None: as many as the run's
    config says. ``known``: anchors and base, judged by the same evaluators on the same examples,
    which are then not judged again.

    Raises:
        CheckpointError: if the folder is not a run with weights.
        ConfigError: if the run's config names no evaluators, or ``num_examples`` is below 2.
    """
    if not (run / "config.yaml").exists():
        raise CheckpointError(f"RUN: {run} must be the folder of a run, config.yaml is not in it")
    weights = trained_weights(run)
    evaluation = Evaluation(load_config(run / "config.yaml"), split, num_examples)
    yardstick = evaluation.yardstick() if known is None else known
    strips = evaluation.truth() | {BASE: evaluation.pictures()}
    evaluation.load(weights)
    file = run / evaluation_file(split)
    report = EvaluationReport(
        yardstick=yardstick, tuned=evaluation.judge_generator(), picture=file.with_suffix(".png")
    )
    strips[TUNED] = evaluation.pictures()
    shown = evaluation.examples[:_PICTURE_ROWS]
    columns = {name: strips[name] for name in (BASE, TUNED)}
    save_grid(file.with_suffix(".png"), shown, columns)
    for name, images in strips.items():
        save_strip(run / "pictures" / split / f"{name}.png", images)
    write_atomic(file, report.to_json())
    return report


def evaluation_file(split: Split) -> str:
    """Where a run keeps its evaluation on a split."""
    return "evaluation.json" if split == "held_out" else f"{split}.json"


class Evaluation:
    """The examples, the generator and the judge of an evaluation.

    Raises:
        ConfigError: if the config names no evaluators, or there are too few examples.
    """

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
        self._encode = CachedEncoder(self.generator, config.generator, config.cache)
        with within("data"):
            pick = data.held_out if split == "held_out" else data.validation
            self.examples = pick(count)
        self.judge = Judge(config, self.examples, device)

    def yardstick(self) -> Yardstick:
        """Judges the anchors, and the generator as it is now as the base."""
        base = self.judge_generator()
        return Yardstick(
            split=self.split,
            objectives=self.judge.objectives,
            rewards={c.label: c.objective for c in self.config.rewards},
            prompts=[example.prompt for example in self.examples[:_PICTURE_ROWS]],
            models=self.judge.anchors() | {BASE: base},
        )

    def load(self, weights: Path) -> None:
        """Puts trained weights into the generator."""
        load_trained(self.generator, weights, self.config.mixed_precision)

    def judge_generator(self) -> Judgement:
        """The generator as it is now."""
        varied = self.examples[:_VARIED_EXAMPLES]
        variants = [self._sample(varied, variant) for variant in range(1, _VARIANTS)]
        return self.judge(self._sample(self.examples), variants)

    def pictures(self) -> Tensor:
        """Of the first few examples, chosen by their position alone."""
        return self._sample(self.examples[:_PICTURE_ROWS])

    def truth(self) -> dict[str, Tensor]:
        """References and, if known, targets of the examples that are shown."""
        shown = {name: images[:_PICTURE_ROWS] for name, images in self.judge.known.items()}
        return {name.replace(" ", "-"): images for name, images in shown.items()}

    def _sample(self, examples: list[Example], variant: int = 0) -> Tensor:
        return FixedSampler(self.generator, self.config, examples, variant, self._encode)()
