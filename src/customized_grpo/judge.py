"""Everything that is measured of pictures, whoever made them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from customized_grpo.config import RunConfig
from customized_grpo.measures import diversity, frechet_distance, high_frequency_energy
from customized_grpo.rewards.attributes import AttributeClassifier
from customized_grpo.rewards.base import ImageEmbedder, RewardSet
from customized_grpo.rewards.dinov2 import cut_out
from customized_grpo.types import Example, Judgement


class Judge:
    """Judges pictures for a fixed list of examples.

    Columns: the score of every evaluator under its label and of every reward as ``reward/LABEL``.
    Where the examples say enough (synthetic worlds do), also:

    - ``region``: identity of the subject's region alone, cut out where the ground truth has it;
    - ``retrieval``: 1 if, among the subjects of all examples, that region is most similar to the
      right one;
    - ``copy``: similarity to the whole reference picture in the prompt evaluator's image features
      (CLIP-I), in excess of what the ground truth has: 0 is right, more is copying;
    - ``attribute/NAME``: 1 if the classifier finds what the prompt asks for.

    Numbers: ``frechet`` (distance of the identity evaluator's features to those of the ground
    truth), ``high_frequency`` (energy relative to the ground truth's) and ``diversity``.
    """

    def __init__(
        self, config: RunConfig, examples: Sequence[Example], device: torch.device
    ) -> None:
        self._examples, self._device = list(examples), device
        self._evaluators = RewardSet(config.evaluators, device, "evaluators")
        self._rewards = RewardSet(config.rewards, device)
        self.objectives = {c.label: c.objective for c in config.evaluators}
        self._identity = self._evaluators.embedder("identity")
        self._prompt = self._evaluators.embedder("prompt")
        path = config.evaluation.classifier
        self._classifier = None if path is None else AttributeClassifier.load(path, device)
        targets = [e.target for e in self._examples if e.target is not None]
        complete = len(targets) == len(self._examples)
        self._targets = torch.stack(targets).to(device) if complete else None

    @torch.no_grad()
    def __call__(self, images: Tensor, variants: Sequence[Tensor] = ()) -> Judgement:
        """Judges images ``[B, 3, H, W]``, one per example.

        ``variants``: further pictures for the first examples, from other noise.
        """
        images = images.to(self._device, torch.float32)
        columns: dict[str, Tensor] = {}
        for prefix, models in (("", self._evaluators), ("reward/", self._rewards)):
            scores = models.score(images, self._examples)
            columns |= {f"{prefix}{n}": scores.scores[:, i] for i, n in enumerate(scores.names)}
        numbers: dict[str, float] = {}
        if self._identity is not None:
            columns |= self._regions(images, self._identity)
            numbers |= self._set_measures(images, variants, self._identity)
        if self._prompt is not None and self._targets is not None:
            columns["copy"] = self._copying(images, self._prompt)
        if self._classifier is not None:
            columns |= self._classifier.hits(images, self._examples)
        return Judgement(
            columns={
                name: [None if math.isnan(v) else v for v in column.tolist()]
                for name, column in columns.items()
            },
            numbers=numbers,
        )

    def _regions(self, images: Tensor, embedder: ImageEmbedder) -> dict[str, Tensor]:
        masks = [(e.target_mask, e.reference_masks) for e in self._examples]
        if any(target is None or reference is None for target, reference in masks):
            return {}
        outputs = embedder.embed(
            _cut_outs(images, [e.target_mask for e in self._examples if e.target_mask is not None])
        )
        references = embedder.embed(
            _cut_outs(
                [e.references[0] for e in self._examples],
                [e.reference_masks[0] for e in self._examples if e.reference_masks],
            ).to(self._device)
        )
        subjects = [e.subject for e in self._examples]
        first = {subject: subjects.index(subject) for subject in subjects}
        nearest = (outputs @ references[list(first.values())].T).argmax(1)
        names = list(first)
        found = [names[i] == wanted for i, wanted in zip(nearest.tolist(), subjects, strict=True)]
        return {"region": (outputs * references).sum(1), "retrieval": torch.tensor(found).float()}

    def _copying(self, images: Tensor, embedder: ImageEmbedder) -> Tensor:
        assert self._targets is not None
        references = embedder.embed(
            torch.stack([e.references[0] for e in self._examples]).to(self._device)
        )
        output, truth = embedder.embed(images), embedder.embed(self._targets)
        return ((output - truth) * references).sum(1)

    def _set_measures(
        self, images: Tensor, variants: Sequence[Tensor], embedder: ImageEmbedder
    ) -> dict[str, float]:
        numbers: dict[str, float] = {}
        features = embedder.embed(images)
        if self._targets is not None:
            numbers["frechet"] = frechet_distance(features, embedder.embed(self._targets))
            energy, truth = (high_frequency_energy(x).mean() for x in (images, self._targets))
            numbers["high_frequency"] = (energy / truth).item()
        if variants:
            others = [embedder.embed(v.to(self._device, torch.float32)) for v in variants]
            numbers["diversity"] = diversity(torch.stack([features[: len(others[0])], *others]))
        return numbers


def _cut_outs(images: Tensor | Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Subjects on grey ``[B, 3, S, S]``, S the longest side of the first picture."""
    side = max(images[0].shape[1:])
    squares = [cut_out(i, m.to(i.device)) for i, m in zip(images, masks, strict=True)]
    resized = [
        F.interpolate(s[None], (side, side), mode="bicubic", antialias=True, align_corners=False)
        for s in squares
    ]
    return torch.cat(resized).clamp(0, 1)
