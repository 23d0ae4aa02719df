"""Where the subject is in a picture, and the subject alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from customized_grpo.errors import DataError
from customized_grpo.rewards.loading import load_model, load_tokenizer
from customized_grpo.rewards.preprocess import Preprocessing
from customized_grpo.types import crop_and_resize

_MAX_BATCH = 32  # pictures per forward: bounds the memory, changes no mask


class Segmenter:
    """CLIPSeg (arXiv:2112.10003): finds what a word names; no boxes or clicks needed."""

    def __init__(self, model: Any, tokenizer: Any, preprocess: Preprocessing) -> None:
        self._model, self._tokenizer, self._preprocess = model, tokenizer, preprocess

    @classmethod
    def load(cls, path: str, device: torch.device) -> Segmenter:
        """Loads one from a folder or hub id, such as 'CIDAS/clipseg-rd64-refined'.

        Raises:
            ConfigError: if it is missing or of another kind; names the field ``segmenter``.
        """
        from transformers import CLIPSegForImageSegmentation

        return cls(
            load_model(CLIPSegForImageSegmentation, path, device, "segmenter"),
            load_tokenizer(path, "segmenter"),
            Preprocessing.from_pretrained(path, "segmenter"),
        )

    @torch.no_grad()
    def masks(self, images: Sequence[Tensor], subjects: Sequence[str]) -> list[Tensor]:
        """Masks ``[1, H, W]``, 1 where the subject is (probability above 0.5), 0 elsewhere.

        Images are ``[3, H, W]`` in [0, 1], of any sizes; a mask of zeros = nothing found.
        """
        masks: list[Tensor] = []
        for first in range(0, len(images), _MAX_BATCH):
            some = images[first : first + _MAX_BATCH]
            tokens = self._tokenizer(
                list(subjects[first : first + _MAX_BATCH]),
                padding=True,
                truncation=True,
                max_length=self._model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self._model.device)
            pixels = self._preprocess.stack(some)
            logits = self._model(pixel_values=pixels, **tokens).logits
            maps = logits.view(len(some), 1, 1, *logits.shape[-2:])
            masks += [_fit(m, image) for m, image in zip(maps, some, strict=True)]
        return masks


def _fit(logits: Tensor, image: Tensor) -> Tensor:
    shape = image.shape[-2:]
    return (F.interpolate(logits, shape, mode="bilinear", align_corners=False)[0] > 0).float()


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


def cut_outs(images: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor]) -> Tensor:
    """Subjects on grey ``[B, 3, S, S]``, S the longest side of the first picture."""
    side = max(images[0].shape[1:])
    squares = [
        cut_out(image, crop_and_resize(mask.to(image.device), *image.shape[1:]))
        for image, mask in zip(images, masks, strict=True)
    ]
    return torch.stack([crop_and_resize(square, side, side) for square in squares])
