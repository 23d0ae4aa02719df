"""CLIP-T: does the picture show what the prompt says? (CLIP, arXiv:2103.00020)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from customized_grpo.config import Checkpoint, RewardConfig, find_checkpoints
from customized_grpo.config.text_limits import TextLimit
from customized_grpo.rewards.dual_encoder import PromptReward, load_clip, text_limit


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipTextConfig(RewardConfig):
    """Cosine similarity of a CLIPModel's embeddings of image and prompt, in [-1, 1]."""

    type: Literal["clip-text"] = "clip-text"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: str
    """Folder, hub id such as 'openai/clip-vit-large-patch14', or 'embedded:reward-clip'."""

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """See Plug."""
        return find_checkpoints(self, {"path": "model"})

    def text_limit(self) -> TextLimit | None:
        """See Plug."""
        return text_limit(self.path, self.path)

    def build(self, device: torch.device) -> PromptReward:
        """Loads model, tokenizer and preprocessing."""
        return PromptReward(load_clip(self.path, device))
