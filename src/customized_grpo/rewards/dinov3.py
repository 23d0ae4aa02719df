"""Identity by DINOv3 features (arXiv:2508.10104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from customized_grpo.rewards.identity import EncoderConfig, IdentityReward


@dataclass(frozen=True, kw_only=True, slots=True)
class Dinov3Config(EncoderConfig):
    """Cosine similarity of CLS features of a DINOv3ViTModel, in [-1, 1] without copy penalty."""

    type: Literal["dinov3"] = "dinov3"  # pyright: ignore[reportIncompatibleVariableOverride]

    def build(self, device: torch.device) -> IdentityReward:
        """Loads 'facebook/dinov3-vitb16-pretrain-lvd1689m' or its like."""
        from transformers import DINOv3ViTModel

        return IdentityReward.load(
            self, DINOv3ViTModel, lambda model, pixels: model(pixels).pooler_output, device
        )
