"""CLIP-I: identity by CLIP's image embeddings (CLIP, arXiv:2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from customized_grpo.rewards.identity import EncoderConfig, IdentityReward


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipImageConfig(EncoderConfig):
    """Cosine similarity of a CLIPModel's image embeddings, in [-1, 1] without copy penalty."""

    type: Literal["clip-image"] = "clip-image"  # pyright: ignore[reportIncompatibleVariableOverride]

    def build(self, device: torch.device) -> IdentityReward:
        """Loads 'openai/clip-vit-large-patch14' or its like."""
        from transformers import CLIPModel

        return IdentityReward.load(
            self,
            CLIPModel,
            lambda model, pixels: model.get_image_features(pixel_values=pixels).pooler_output,
            device,
        )
