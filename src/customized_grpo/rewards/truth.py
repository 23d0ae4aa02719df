"""Is it right? Yes or no for every picture, where the data know what would be.

A person understands shares: how often all that the prompt asks for is there, how often it is the
subject, how often the reference was copied. Neither rewards nor evaluators of a run are asked, but
for the features of the evaluator of identity.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from customized_grpo.rewards.attributes import AttributeClassifier
from customized_grpo.rewards.base import ImageEmbedder
from customized_grpo.rewards.regions import cut_outs
from customized_grpo.types import Example, KnowsSubjects, crop_and_resize

SHARES = ("prompt_right", "subject_right", "both_right", "copies")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Lineup:
    """Subjects with the look that some of the examples ask for."""

    rows: list[int]
    """The n examples."""
    features: Tensor
    """Of the portraits, ``[S, D]``."""
    own: Tensor
    """Place of each example's own subject, ``[n]``."""
    rivals: Tensor
    """Which portraits each example's is compared with, its own not among them, ``[n, S]``."""


class Truth:
    """Judges pictures of a fixed list of examples; what their data do not know is left out."""

    def __init__(
        self,
        examples: Sequence[Example],
        source: object,
        encoder: ImageEmbedder | None,
        classifier: AttributeClassifier | None,
        device: torch.device,
    ) -> None:
        self._examples, self._device = list(examples), device
        self._source = source if isinstance(source, KnowsSubjects) else None
        self._encoder, self._classifier = encoder, classifier
        self._masks = [e.target_mask for e in self._examples if e.target_mask is not None]
        self._targets = [e.target for e in self._examples if e.target is not None]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Columns ``[B]`` of images ``[B, 3, H, W]``, one per example; the SHARES come first.

        ``prompt_right``: 1 where the classifier finds everything that is asked for
        (``attribute/NAME`` say what). ``subject_right``: 1 where the subject's region, cut out
        where the truth has it, is most similar to the portrait of the right subject with the look
        that is asked for (``subject`` is that similarity). ``copies``: 1 where the whole picture is
        more similar to the whole reference than any example's truth is to its own.
        """
        images = images.to(self._device, torch.float32)
        hits = {}
        if self._classifier is not None:
            hits = self._classifier.hits(images, self._examples)
        shares: dict[str, Tensor] = {}
        if hits:
            shares["prompt_right"] = torch.stack([h != 0 for h in hits.values()]).all(0).float()
        regions = self._regions(images)
        shares |= {name: column for name, column in regions.items() if name in SHARES}
        if len(shares) == 2:
            shares["both_right"] = shares["prompt_right"] * shares["subject_right"]
        shares |= self._copies(images)
        return shares | hits | regions

    def _regions(self, images: Tensor) -> dict[str, Tensor]:
        if self._encoder is None or not self._lineups:
            return {}
        outputs = self._encoder.embed(cut_outs(images, self._masks))
        similar, right = torch.empty(2, len(outputs))
        for lineup in self._lineups:
            similarity = outputs[lineup.rows] @ lineup.features.T
            own = similarity.gather(1, lineup.own[:, None])[:, 0]
            best = similarity.masked_fill(~lineup.rivals, -torch.inf).amax(1)
            similar[lineup.rows], right[lineup.rows] = own.cpu(), (own > best).float().cpu()
        return {"subject_right": right, "subject": similar}

    @cached_property
    def _lineups(self) -> list[_Lineup]:
        if self._source is None or len(self._masks) < len(self._examples):
            return []
        rows: dict[Hashable, list[int]] = {}
        for row, example in enumerate(self._examples):
            rows.setdefault(self._source.look(example), []).append(row)
        return [self._lineup(self._source, look, some) for look, some in rows.items()]

    def _lineup(self, source: KnowsSubjects, look: Hashable, rows: list[int]) -> _Lineup:
        assert self._encoder is not None
        own = [self._examples[row].subject for row in rows]
        rivals = [source.rivals(self._examples[row]) for row in rows]
        names = list(dict.fromkeys(name for some in (*rivals, own) for name in some))
        others = [{*some} - {name} for some, name in zip(rivals, own, strict=True)]
        compared = [[name in some for name in names] for some in others]
        pictures, masks = source.portraits(names, look)
        return _Lineup(
            rows=rows,
            features=self._encoder.embed(cut_outs(pictures.to(self._device), masks)),
            own=torch.tensor([names.index(name) for name in own], device=self._device),
            rivals=torch.tensor(compared, device=self._device),
        )

    def _copies(self, images: Tensor) -> dict[str, Tensor]:
        if self.copy_limit is None:
            return {}
        return {"copies": (self._to_references(images) > self.copy_limit).float().cpu()}

    @cached_property
    def copy_limit(self) -> float | None:
        """The highest similarity of a truth to its reference: what lies above is a copy.

        A quantile below 1 would call some truths copies. Processes that share examples agree on
        the highest of theirs. None: there is no truth.
        """
        if self._encoder is None or len(self._targets) < len(self._examples):
            return None
        size = self._examples[0].references[0].shape[1:]
        truths = torch.stack([crop_and_resize(target, *size) for target in self._targets])
        return self._to_references(truths.to(self._device)).max().item()

    @torch.no_grad()
    def _to_references(self, images: Tensor) -> Tensor:
        """Similarity ``[B]`` to the whole reference; of several, to the most similar one."""
        assert self._encoder is not None
        places, features = self._references
        similarity = (self._encoder.embed(images)[places] * features).sum(1)
        best = similarity.new_full((len(images),), -torch.inf)
        return best.scatter_reduce(0, places, similarity, "amax")

    @cached_property
    def _references(self) -> tuple[Tensor, Tensor]:
        """Whose each reference is ``[R]``, and features ``[R, D]``."""
        assert self._encoder is not None
        size = self._examples[0].references[0].shape[1:]
        shown = [(row, r) for row, e in enumerate(self._examples) for r in e.references]
        pictures = torch.stack([crop_and_resize(picture, *size) for _, picture in shown])
        places = torch.tensor([row for row, _ in shown], device=self._device)
        return places, self._encoder.embed(pictures.to(self._device))
