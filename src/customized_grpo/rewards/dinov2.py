"""Identity by DINOv2 features: is it the same subject? (arXiv:2304.07193)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from customized_grpo.assets import resolve_checkpoint
from customized_grpo.config import RewardConfig
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.rewards.base import distinct
from customized_grpo.rewards.preprocess import Preprocessing
from customized_grpo.types import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Dinov2Config(RewardConfig):
    """Cosine similarity of CLS features of image and reference, in [-1, 1]; best of several."""

    type: Literal["dinov2"] = "dinov2"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: str
    """Folder, hub id such as 'facebook/dinov2-base', or 'embedded:reward-dino'."""
    region: Literal["image", "subject"] = "image"
    """Of the reference: the whole picture, or the subject cut out by its mask (grey around it), so
    that copying the reference's background is not rewarded."""

    def build(self, device: torch.device) -> Dinov2Reward:
        """Loads model and preprocessing."""
        from transformers import Dinov2Model

        folder = resolve_checkpoint(self.path)
        try:
            model = Dinov2Model.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"path: {self.path!r} is not a Dinov2Model checkpoint: "
                f"{' '.join(str(error).split())}"
            ) from error
        return Dinov2Reward(
            model.to(device).eval().requires_grad_(False),  # pyright: ignore
            Preprocessing.from_pretrained(folder),
            self.region,
        )


class Dinov2Reward:
    """See Dinov2Config."""

    def __init__(self, model: Any, preprocess: Preprocessing, region: str) -> None:
        self._model, self._preprocess, self._region = model, preprocess, region

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """See the Protocol."""
        unique, place = distinct(examples)
        output = self.embed(images)
        best = torch.full((len(images),), -torch.inf, device=images.device)
        for number in range(max(len(example.references) for example in unique)):
            # An example with fewer references repeats its last one, which changes no maximum.
            features = torch.cat(
                [self.embed(self._reference(example, number)[None].to(images.device))
                 for example in unique]
            )  # fmt: skip
            best = torch.maximum(best, (output * features[place.to(images.device)]).sum(1))
        return best

    def embed(self, images: Tensor) -> Tensor:
        """See ImageEmbedder."""
        features = self._model(pixel_values=self._preprocess(images)).pooler_output
        return F.normalize(features.float(), dim=-1)

    def _reference(self, example: Example, number: int) -> Tensor:
        number = min(number, len(example.references) - 1)
        image = example.references[number]
        if self._region == "image":
            return image
        if example.reference_masks is None:
            raise DataError(
                f"example {example.id!r}: region 'subject' needs a mask for every reference, got "
                "none; add masks to the data or set region: image"
            )
        return cut_out(image, example.reference_masks[number])


def cut_out(image: Tensor, mask: Tensor) -> Tensor:
    """The subject on mid-grey, in the smallest square that holds it; ``[3, H, W]``, ``[1, H, W]``.

    Raises:
        DataError: if the mask is empty.
    """
    rows, columns = (mask[0] > 0.5).any(1).nonzero()[:, 0], (mask[0] > 0.5).any(0).nonzero()[:, 0]
    if not len(rows):
        raise DataError("mask: must show the subject, got an empty one; redraw it")
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    subject = torch.lerp(torch.full_like(image, 0.5), image, mask)[:, top:bottom, left:right]
    side = max(subject.shape[1:])
    y, x = (side - subject.shape[1]) // 2, (side - subject.shape[2]) // 2
    square = image.new_full((3, side, side), 0.5)
    square[:, y : y + subject.shape[1], x : x + subject.shape[2]] = subject
    return square
