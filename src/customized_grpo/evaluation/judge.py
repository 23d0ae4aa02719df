"""Measures of pictures in memory, by a run's models and by what its examples know.

To add a measure of single pictures, write a method that gives columns and call it in
``Judge.__call__``; it is then in the table, in ``evaluation.json`` and in the results of studies.
``report/tables.py`` says under which heading a report shows it. Shares of right pictures come from
``rewards/truth.py``, which training asks too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from customized_grpo.config import RunConfig
from customized_grpo.config.names import COPY, REFERENCE, TRUTH, UNRELATED
from customized_grpo.data.base import DataSource
from customized_grpo.errors import RewardError
from customized_grpo.evaluation.measures import (
    diversity_column,
    frechet_distance,
    high_frequency_energy,
)
from customized_grpo.evaluation.outcome import Judgement
from customized_grpo.rewards.attributes import AttributeClassifier
from customized_grpo.rewards.base import RewardSet
from customized_grpo.rewards.truth import Truth
from customized_grpo.types import Example, RewardScores, crop_and_resize

logger = logging.getLogger("customized_grpo")


class Judge:
    """Judges pictures for a fixed list of examples; what their data do not say is left out."""

    def __init__(
        self,
        config: RunConfig,
        examples: Sequence[Example],
        source: DataSource,
        device: torch.device,
    ) -> None:
        self._examples, self._device = list(examples), device
        self._evaluators = RewardSet(config.evaluators, device, "evaluators")
        self._rewards = RewardSet(config.pointwise_rewards, device)
        self._identity = self._evaluators.embedder("identity")
        self._prompt = self._evaluators.embedder("prompt")
        path = config.evaluation.classifier
        classifier = None if path is None else AttributeClassifier.load(path, device)
        self._truth = Truth(self._examples, source, self._identity, classifier, device)
        first = self._examples[0].references[0]
        self._size = first.shape[1], first.shape[2]
        self.known = {REFERENCE: self._stack([e.references[0] for e in self._examples])}
        """Pictures of the examples in one size: references and, if all have one, ground truth."""
        targets = [e.target for e in self._examples if e.target is not None]
        if len(targets) == len(self._examples):
            self.known[TRUTH] = self._stack(targets)

    def _stack(self, images: Sequence[Tensor]) -> Tensor:
        return torch.stack([crop_and_resize(i, *self._size) for i in images]).to(self._device)

    def anchors(self) -> dict[str, Judgement]:
        """Judges the reference itself, the ground truth and the ground truth of another example."""
        anchors = {COPY: self(self.known[REFERENCE])}
        if TRUTH in self.known:
            anchors[TRUTH] = self(self.known[TRUTH])
            anchors[UNRELATED] = self(self.known[TRUTH].roll(1, 0))
        return anchors

    @torch.no_grad()
    def __call__(self, images: Tensor, variants: Sequence[Tensor] = ()) -> Judgement:
        """Judges images ``[B, 3, H, W]``, one per example.

        ``variants``: further pictures for the first examples, from other noise.

        Raises:
            RewardError: if an evaluator or a reward could score none of them.
        """
        images = images.to(self._device, torch.float32)
        columns = self._truth(images) | self._scores(images) | self._copying(images)
        return Judgement.of(columns, self._quality(images) | self._diversity(images, variants))

    def _scores(self, images: Tensor) -> dict[str, Tensor]:
        """Scores of every evaluator under its label and of every reward as ``reward/LABEL``; what
        they say of copying, which needs no ground truth, as ``copy_gap`` in the same way."""
        columns: dict[str, Tensor] = {}
        for prefix, models in (("", self._evaluators), ("reward/", self._rewards)):
            scores = models.score(images, self._examples)
            _check_scored("rewards" if prefix else "evaluators", scores)
            columns |= {f"{prefix}{n}": scores.scores[:, i] for i, n in enumerate(scores.names)}
            if scores.copy_gap.isfinite().any():
                columns[f"{prefix}copy_gap"] = scores.copy_gap
        return columns

    def _copying(self, images: Tensor) -> dict[str, Tensor]:
        """Similarity to the whole reference in excess of the ground truth's: more is copying.

        In the image features of the prompt's evaluator (CLIP-I), which see the background too.
        """
        if self._prompt is None or TRUTH not in self.known:
            return {}
        references, truth = (self._prompt.embed(self.known[name]) for name in (REFERENCE, TRUTH))
        return {"copy": ((self._prompt.embed(images) - truth) * references).sum(1)}

    def _quality(self, images: Tensor) -> dict[str, float]:
        """What no reward sees, against the ground truth.

        ``frechet`` is the distance of the identity evaluator's features, ``high_frequency`` the
        energy of fine texture relative to the truth's.
        """
        if self._identity is None or TRUTH not in self.known:
            return {}
        truth = self.known[TRUTH]
        resized = torch.stack([crop_and_resize(t, *images.shape[-2:]) for t in truth])
        energy, wanted = (high_frequency_energy(x).mean() for x in (images, resized))
        features = (self._identity.embed(x) for x in (images, truth))
        return {
            "frechet": frechet_distance(*features),
            "high_frequency": (energy / wanted).item(),
        }

    def _diversity(self, images: Tensor, variants: Sequence[Tensor]) -> dict[str, float]:
        """How different the pictures of one example from other noise are."""
        if self._identity is None or not variants:
            return {}
        count = len(variants[0])
        sets = [images[:count], *(v.to(self._device, torch.float32) for v in variants)]
        features = torch.cat([self._identity.embed(some) for some in sets])
        column = diversity_column(features, list(range(count)) * len(sets))
        return {"diversity": column.mean().item()}


def _check_scored(section: str, scores: RewardScores) -> None:
    """Says which pictures have no score and why: a mean over what is left looks like any other, and
    one over nothing would be kept as a study's base."""
    for name, column in zip(scores.names, scores.scores.unbind(1), strict=True):
        lost = int(column.isnan().sum())
        own = [error for error in scores.errors if error.startswith(f"{name}: ")]
        why = "; ".join(own) or f"{name}: their scores are NaN"
        if lost == len(column):
            raise RewardError(
                f"{section}: none of {lost} pictures could be scored; {why}; mend that, and start "
                "again"
            )
        if lost:
            logger.warning(
                "%s: %d of %d pictures have no score; %s", section, lost, len(column), why
            )
