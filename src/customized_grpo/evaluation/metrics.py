"""The models that measure: what each computes of a picture, and what its numbers depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from customized_grpo.config import RewardConfig, revisions
from customized_grpo.config.decoding import to_raw
from customized_grpo.data.listed import PictureCache
from customized_grpo.errors import ConfigError, RewardError, within
from customized_grpo.evaluation.items import BenchmarkSet, Item, Photo, make_example
from customized_grpo.rewards.base import PartialFailures, Reward
from customized_grpo.rewards.identity import IdentityConfig, IdentityReward
from customized_grpo.types import Example

_MEASURING = 1  # to be raised when the code here, or of a reward, gives other numbers

IDENTITY, PROMPT = "identity", "prompt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What is asked of a model about one picture; a number depends on nothing else."""

    photo: Photo
    words: str
    """What the subject is called."""
    prompt: str = ""
    """'' where no prompt is involved."""
    references: tuple[Photo, ...] = ()

    @classmethod
    def of(cls, item: Item, photo: Photo, wanted: BenchmarkSet) -> Query:
        """Asks about the picture of an item, by the item's own prompt."""
        return cls(
            photo=photo,
            words=wanted.subjects[item.subject].words,
            prompt=item.prompt,
            references=wanted.references(item),
        )

    def example(self, cache: PictureCache) -> Example:
        """What a reward is asked about."""
        return make_example(self.words, self.prompt, self.references, cache)

    def key(self) -> list[Any]:
        """Names the content of the pictures, not their files."""
        return [self.photo.digest, self.words, self.prompt, [r.digest for r in self.references]]


Compute = Callable[[Sequence[Tensor], Sequence[Query]], Tensor]
"""Numbers ``[B, ...]`` of pictures ``[3, H, W]`` and what is asked about each."""


class Metric:
    """A model of the config: an image encoder of identity, or one that scores pictures."""

    def __init__(self, config: RewardConfig, position: int, device: torch.device) -> None:
        self.config, self.label, self.objective = config, config.label, config.objective
        self._device = device
        with within(f"metrics.{position}"):
            if isinstance(config, IdentityConfig) and config.copy_penalty:
                raise ConfigError(
                    f"copy_penalty: must be 0 in an evaluation, got {config.copy_penalty}; copying "
                    "is measured on its own"
                )
            self._model: Reward | IdentityReward = config.build(device)
        self.identity = identity_of(config, device)  # of what has been loaded, and downloaded
        self._references = PictureCache()

    @property
    def is_encoder(self) -> bool:
        """Whether identity is measured by its features, against any photo."""
        return isinstance(self._model, IdentityReward) and self.objective == IDENTITY

    @property
    def pools(self) -> str:
        """How several references count: by the most similar one, or by their mean."""
        return getattr(self.config, "references", "max")

    @property
    def leading(self) -> str:
        """The column that stands for its objective where the metric is the objective's first."""
        return f"{self.label}/photos" if self.is_encoder else self.label

    def digest(self, what: str) -> str:
        """Names a kind of numbers of this model, for the store."""
        text = json.dumps([what, self.identity], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def outputs(self, images: Sequence[Tensor], queries: Sequence[Query]) -> Tensor:
        """Features ``[B, D]`` of a model's pictures."""
        assert isinstance(self._model, IdentityReward)
        moved = [image.to(self._device) for image in images]
        features = self._model.embed_outputs(moved, [r.words for r in queries])
        self._check_finite(features, queries, "its features are NaN; mend the model or picture")
        return features

    def photos(self, images: Sequence[Tensor], queries: Sequence[Query]) -> Tensor:
        """Features ``[B, D]`` of photos."""
        assert isinstance(self._model, IdentityReward)
        masks = [None if r.photo.mask is None else r.photo.mask.load() for r in queries]
        moved = [image.to(self._device) for image in images]
        features = self._model.embed_photos(moved, masks, [r.words for r in queries])
        self._check_finite(
            features, queries, "no subject is found in this photo; put NAME.mask.png beside it"
        )
        return features

    def _check_finite(self, numbers: Tensor, queries: Sequence[Query], why: str) -> None:
        """Ends the evaluation if a picture has no number: a part of them is no evaluation."""
        whole = numbers.isfinite().flatten(1).all(1) if numbers.dim() > 1 else numbers.isfinite()
        if not whole.all():
            query = queries[int(whole.int().argmin())]
            raise RewardError(
                f"{self.label}: {query.photo.name} could not be scored ({query.words}): {why} "
                "and start again, what is measured is kept"
            )

    def scores(self, images: Sequence[Tensor], queries: Sequence[Query]) -> Tensor:
        """Scores ``[B]``."""
        scores = torch.full((len(images),), torch.nan)
        shapes = [tuple(image.shape) for image in images]
        for shape in dict.fromkeys(shapes):
            rows = [row for row, other in enumerate(shapes) if other == shape]
            batch = torch.stack([images[row] for row in rows]).to(self._device)
            examples = [queries[row].example(self._references) for row in rows]
            try:
                with torch.no_grad():
                    scores[rows] = self._model.score(batch, examples).float().cpu()
            except RewardError as error:
                raise RewardError(f"{self.label}: {error}") from error
        model = self._model
        why = model.take_errors() if isinstance(model, PartialFailures) else ()
        self._check_finite(scores, queries, f"{'; '.join(why) or 'it is NaN'}; mend that")
        return scores


def identity_of(config: RewardConfig, device: torch.device) -> dict[str, Any]:
    """What a model's numbers depend on: its config, the files of its checkpoints, the software."""
    from PIL import __version__ as pillow_version
    from transformers import __version__ as transformers_version

    raw = {k: v for k, v in to_raw(config).items() if k not in ("name", "objective", "weight")}
    return {
        "config": raw,
        "checkpoints": revisions(config),
        "software": {
            "torch": torch.__version__,
            "transformers": transformers_version,
            "pillow": pillow_version,
            "customized-grpo": version("customized-grpo"),
            "measuring": _MEASURING,
        },
        "device": device.type,
    }
