"""Identity by DINOv2 features (arXiv:2304.07193)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from customized_grpo.rewards.identity import EncoderConfig, IdentityReward


@dataclass(frozen=True, kw_only=True, slots=True)
class Dinov2Config(EncoderConfig):
    """Cosine similarity of CLS features of a Dinov2Model, in [-1, 1] without copy penalty."""

    type: Literal["dinov2"] = "dinov2"  # pyright: ignore[reportIncompatibleVariableOverride]

    def build(self, device: torch.device) -> IdentityReward:
        """Loads 'facebook/dinov2-base' or its like."""
        from transformers import Dinov2Model

        return IdentityReward.load(
            self, Dinov2Model, lambda model, pixels: model(pixels).pooler_output, device
        )
