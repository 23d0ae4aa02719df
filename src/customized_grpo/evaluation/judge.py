"""Everything that is measured of pictures, whoever made them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from customized_grpo.config import RunConfig
from customized_grpo.evaluation.measures import diversity, frechet_distance, high_frequency_energy
from customized_grpo.evaluation.results import CHANCE, COPY, REFERENCE, TRUTH
from customized_grpo.rewards.attributes import AttributeClassifier
from customized_grpo.rewards.base import ImageEmbedder, RewardSet
from customized_grpo.rewards.regions import cut_out
from customized_grpo.types import Example, Judgement, crop_and_resize


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
        first = self._examples[0].references[0]
        self._size = first.shape[1], first.shape[2]
        references = [self._fit(e.references[0]) for e in self._examples]
        self.known = {REFERENCE: torch.stack(references).to(device)}
        """Pictures of the examples in one size: references and, if all have one, ground truth."""
        targets = [self._fit(e.target) for e in self._examples if e.target is not None]
        if len(targets) == len(self._examples):
            self.known[TRUTH] = torch.stack(targets).to(device)

    def _fit(self, image: Tensor) -> Tensor:
        return crop_and_resize(image, *self._size)

    def anchors(self) -> dict[str, Judgement]:
        """Judgements of the reference itself, of the ground truth and of another example's."""
        anchors = {COPY: self(self.known[REFERENCE])}
        if TRUTH in self.known:
            anchors[TRUTH] = self(self.known[TRUTH])
            anchors[CHANCE] = self(self.known[TRUTH].roll(1, 0))
        return anchors

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
        if self._prompt is not None and TRUTH in self.known:
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
        masks = [e.target_mask for e in self._examples if e.target_mask is not None]
        shown = [e.reference_masks[0] for e in self._examples if e.reference_masks]
        if not len(masks) == len(shown) == len(self._examples):
            return {}
        outputs = embedder.embed(_cut_outs(images, masks))
        references = [e.references[0].to(self._device) for e in self._examples]
        wanted = embedder.embed(_cut_outs(references, shown))
        subjects = [e.subject for e in self._examples]
        first = {subject: subjects.index(subject) for subject in subjects}
        nearest = (outputs @ wanted[list(first.values())].T).argmax(1)
        names = list(first)
        found = [names[i] == name for i, name in zip(nearest.tolist(), subjects, strict=True)]
        return {"region": (outputs * wanted).sum(1), "retrieval": torch.tensor(found).float()}

    def _copying(self, images: Tensor, embedder: ImageEmbedder) -> Tensor:
        references, truth = (embedder.embed(self.known[name]) for name in (REFERENCE, TRUTH))
        return ((embedder.embed(images) - truth) * references).sum(1)

    def _set_measures(
        self, images: Tensor, variants: Sequence[Tensor], embedder: ImageEmbedder
    ) -> dict[str, float]:
        numbers: dict[str, float] = {}
        features = embedder.embed(images)
        if TRUTH in self.known:
            truth = self.known[TRUTH]
            numbers["frechet"] = frechet_distance(features, embedder.embed(truth))
            resized = torch.stack([crop_and_resize(t, *images.shape[-2:]) for t in truth])
            energy, wanted = (high_frequency_energy(x).mean() for x in (images, resized))
            numbers["high_frequency"] = (energy / wanted).item()
        if variants:
            others = [embedder.embed(v.to(self._device, torch.float32)) for v in variants]
            numbers["diversity"] = diversity(torch.stack([features[: len(others[0])], *others]))
        return numbers


def _cut_outs(images: Tensor | Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Subjects on grey ``[B, 3, S, S]``, S the longest side of the first picture."""
    side = max(images[0].shape[1:])
    squares = [
        cut_out(image, crop_and_resize(mask.to(image.device), *image.shape[1:]))
        for image, mask in zip(images, masks, strict=True)
    ]
    return torch.stack([crop_and_resize(square, side, side) for square in squares])
