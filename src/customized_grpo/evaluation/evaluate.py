"""A run's weights against its base on examples not trained on: fixed noise, no randomness."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from customized_grpo.config import RunConfig
from customized_grpo.config.names import BASE
from customized_grpo.devices import pick_device
from customized_grpo.errors import CheckpointError, ConfigError, within
from customized_grpo.evaluation.items import Item
from customized_grpo.evaluation.judge import Judge
from customized_grpo.evaluation.marks import marks
from customized_grpo.evaluation.outcome import TUNED, Judgement, Outcome, Yardstick
from customized_grpo.files import write_atomic
from customized_grpo.generators.cache import CachedEncoder
from customized_grpo.pictures import save_grid, save_strip
from customized_grpo.runs.progress import heartbeat, working
from customized_grpo.runs.run import Run
from customized_grpo.training.build import build_world, load_trained
from customized_grpo.training.sampling import FixedSampler
from customized_grpo.types import Example

Split = Literal["held_out", "validation"]

NUM_SHOWN = 10
"""Examples in the pictures, chosen by their position alone."""
_NUM_VARIANTS, _NUM_VARIED = 4, 64  # pictures of an example, and examples, for the diversity


@dataclass(frozen=True)
class Place:
    """Where a run keeps its evaluation on a split."""

    run: Path
    split: Split

    @property
    def json(self) -> Path:
        """The outcome."""
        return self.run / ("evaluation.json" if self.split == "held_out" else "validation.json")

    @property
    def grid(self) -> Path:
        """References, prompts and pictures of the examples that are shown."""
        return self.json.with_suffix(".png")

    def strip(self, name: str) -> Path:
        """The same pictures pixel for pixel, by one model or anchor."""
        return self.run / "pictures" / self.split / f"{name.replace(' ', '-')}.png"


def evaluate_run(
    folder: Path,
    split: Split = "held_out",
    num_examples: int | None = None,
    known: Yardstick | None = None,
) -> Outcome:
    """Evaluates a run; writes ``evaluation.json`` and pictures into its folder.

    On the validation split, the files are called ``validation``: recipes are chosen there, so that
    the held-out examples stay unseen by the person too. ``known`` are anchors and base, judged by
    the same evaluators on the same examples, which are then not judged again.

    Raises:
        CheckpointError: if the folder is not a run with weights.
        ConfigError: if the run's config names no evaluators, or ``num_examples`` is below 2.
    """
    run = Run.open(folder)
    weights, digest = run.weights, run.digest  # a run without is refused before models are loaded
    evaluation = Evaluation(run.config, split, num_examples)
    yardstick = evaluation.yardstick() if known is None else known
    strips = evaluation.truth() | {BASE: evaluation.pictures()}
    evaluation.load(weights)
    own = evaluation.judge_generator(TUNED)
    outcome = Outcome(name=TUNED, own=own, yardstick=yardstick, weights=digest)
    strips[TUNED] = evaluation.pictures()
    place = Place(folder, split)
    shown = {name: strips[name] for name in (BASE, TUNED)}
    judged = {BASE: yardstick.base, TUNED: outcome.own}
    marked = {name: marks(j, len(strips[name])) for name, j in judged.items() if j}
    save_grid(place.grid, evaluation.examples[:NUM_SHOWN], shown, marks=marked)
    for name, images in strips.items():
        save_strip(place.strip(name), images)
    write_atomic(place.json, outcome.to_json())
    return outcome


def current_outcome(run: Run, split: Split = "held_out") -> Outcome:
    """The evaluation of the weights that a run has now.

    Raises:
        CheckpointError: if it was not evaluated, or by other weights, as before it was resumed.
    """
    outcome = Outcome.read(Place(run.folder, split).json)
    if outcome.weights != run.digest:
        raise CheckpointError(
            f"RUN: {run.folder} must have been evaluated with the weights that it has now, its "
            f"{Place(run.folder, split).json.name} is "
            f"{'of other ones' if outcome.weights else 'older than the record of which'}; run "
            f"`cgrpo evaluate {shlex.quote(str(run.folder))}`"
        )
    return outcome


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
        config = config.evaluated()
        self._config, self._split = config, split
        device = pick_device(config.device)
        data, self._generator = build_world(config, device)
        self._encode = CachedEncoder(self._generator, config.generator, config.cache)
        with within("data"):
            self.examples = (data.held_out if split == "held_out" else data.validation)(count)
        self._judge = Judge(config, self.examples, data, device)

    def yardstick(self) -> Yardstick:
        """Judges the anchors, and the generator as it is now as the base."""
        return Yardstick(
            set=self._split,
            items=tuple(
                Item(subject=example.subject, prompt=example.prompt, prompt_index=row)
                for row, example in enumerate(self.examples)
            ),
            objectives={c.label: c.objective for c in self._config.evaluators},
            rewards={c.label: c.objective for c in self._config.pointwise_rewards},
            base=self.judge_generator(BASE),
            anchors=self._judge.anchors(),
        )

    def load(self, weights: Path) -> None:
        """Puts trained weights into the generator."""
        load_trained(self._generator, weights, self._config.mixed_precision)

    def judge_generator(self, name: str) -> Judgement:
        """The generator as it is now, which is called so."""
        varied = self.examples[:_NUM_VARIED]
        images, *variants = (
            self._sample(
                examples, variant, what=f"{name}: pictures {variant + 1} of {_NUM_VARIANTS}"
            )
            for variant, examples in enumerate([self.examples, *[varied] * (_NUM_VARIANTS - 1)])
        )
        with heartbeat(lambda: f"{name}: judging"):
            return self._judge(images, variants)

    def pictures(self) -> Tensor:
        """Pictures of the examples that are shown, by the generator as it is now."""
        return self._sample(self.examples[:NUM_SHOWN], what="pictures to be shown")

    def truth(self) -> dict[str, Tensor]:
        """References and, if known, targets of the examples that are shown."""
        return {name: images[:NUM_SHOWN] for name, images in self._judge.known.items()}

    def _sample(self, examples: list[Example], variant: int = 0, *, what: str) -> Tensor:
        """``what``: is said of it while it goes on."""
        with heartbeat(lambda: f"{what}: encoding"):
            sampler = FixedSampler(self._generator, self._config, examples, variant, self._encode)
        with working(what, sampler.num_calls) as on_step:
            return sampler(on_step)
