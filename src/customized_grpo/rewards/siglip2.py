"""SigLIP 2: does the picture show what the prompt says? (arXiv:2502.14786)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from customized_grpo.config import Checkpoint, RewardConfig, find_checkpoints
from customized_grpo.config.text_limits import TextLimit
from customized_grpo.rewards.dual_encoder import PromptReward, load_siglip, text_limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Siglip2Config(RewardConfig):
    """Match of image and prompt in a SigLIP or SigLIP 2 model of fixed or native aspect ratio."""

    type: Literal["siglip2"] = "siglip2"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: str
    """Folder or hub id such as 'google/siglip2-so400m-patch14-384'."""
    score: Literal["cosine", "logit"] = "cosine"
    """cosine in [-1, 1]; logit = ``exp(logit_scale) * cosine + logit_bias``, whose sigmoid is the
    model's probability of a match. Within a group both rank alike and normalise to the same."""

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """See Plug."""
        return find_checkpoints(self, {"path": "model"})

    def text_limit(self) -> TextLimit | None:
        """See Plug."""
        return text_limit(self.path, self.path)

    def build(self, device: torch.device) -> PromptReward:
        """Loads model, tokenizer and preprocessing."""
        encoder = load_siglip(self.path, device)
        if self.score == "cosine":
            return PromptReward(encoder)
        model = encoder.model
        return PromptReward(encoder, model.logit_scale.exp().item(), model.logit_bias.item())
