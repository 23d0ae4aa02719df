"""CLIP-T: does the picture show what the prompt says? (CLIP, arXiv:2103.00020)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from customized_grpo.assets import resolve_checkpoint
from customized_grpo.config import RewardConfig
from customized_grpo.errors import ConfigError
from customized_grpo.rewards.base import distinct
from customized_grpo.rewards.preprocess import Preprocessing
from customized_grpo.types import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipTextConfig(RewardConfig):
    """Cosine similarity of a CLIPModel's embeddings of image and prompt, in [-1, 1]."""

    type: Literal["clip-text"] = "clip-text"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: str
    """Folder, hub id such as 'openai/clip-vit-large-patch14', or 'embedded:reward-clip'."""

    def build(self, device: torch.device) -> ClipTextReward:
        """Loads model, tokenizer and preprocessing."""
        from transformers import AutoTokenizer, CLIPModel

        folder = resolve_checkpoint(self.path)
        try:
            model = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"path: {self.path!r} is not a CLIPModel checkpoint: {' '.join(str(error).split())}"
            ) from error
        return ClipTextReward(
            model.to(device).eval().requires_grad_(False),  # pyright: ignore
            tokenizer,
            Preprocessing.from_pretrained(folder),
        )


class ClipTextReward:
    """See ClipTextConfig."""

    def __init__(self, model: Any, tokenizer: Any, preprocess: Preprocessing) -> None:
        self._model, self._tokenizer, self._preprocess = model, tokenizer, preprocess

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """See the Protocol."""
        unique, place = distinct(examples)
        tokens = self._tokenizer(
            [example.prompt for example in unique],
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(images.device)
        text = self._model.get_text_features(**tokens).pooler_output
        return F.cosine_similarity(self.embed(images), text.float()[place.to(images.device)])

    def embed(self, images: Tensor) -> Tensor:
        """See ImageEmbedder."""
        pixels = self._preprocess(images)
        features = self._model.get_image_features(pixel_values=pixels).pooler_output
        return F.normalize(features.float(), dim=-1)
