"""PickScore: which picture would people pick for the prompt? (arXiv:2305.01569)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from customized_grpo.config import Checkpoint, RewardConfig, find_checkpoints
from customized_grpo.config.text_limits import TextLimit
from customized_grpo.rewards.dual_encoder import PromptReward, load_clip, text_limit


@dataclass(frozen=True, kw_only=True, slots=True)
class PickScoreConfig(RewardConfig):
    """``exp(logit_scale) * cosine`` of a CLIPModel tuned on human choices, as its authors score."""

    type: Literal["pickscore"] = "pickscore"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: str = "yuvalkirstain/PickScore_v1"
    """Folder or hub id of the CLIPModel, or 'embedded:reward-preference'."""
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Folder or hub id of tokenizer and preprocessing, which the authors take from here."""

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """See Plug."""
        return find_checkpoints(self, {"path": "model", "processor": "texts"})

    def text_limit(self) -> TextLimit | None:
        """See Plug."""
        return text_limit(self.path, self.processor)

    def build(self, device: torch.device) -> PromptReward:
        """Loads model, tokenizer and preprocessing."""
        encoder = load_clip(self.path, device, self.processor)
        return PromptReward(encoder, scale=encoder.model.logit_scale.exp().item())
