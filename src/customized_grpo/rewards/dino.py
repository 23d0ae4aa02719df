"""Identity by the features of the first DINO (arXiv:2104.14294): what papers call DINO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from customized_grpo.rewards.identity import EncoderConfig, IdentityReward
from customized_grpo.rewards.preprocess import Preprocessing

# Of DINO's own evaluation (facebookresearch/dino, eval_knn.py) and of the subject-driven field
# since. The preprocessor_config.json of facebook/dino-vits16 says something else: mean and std 0.5,
# bilinear, no crop.
PUBLISHED = Preprocessing(
    fit="shortest",
    size=(256, 256),
    crop=(224, 224),
    mode="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DinoConfig(EncoderConfig):
    """Cosine similarity of CLS features of a ViTModel, in [-1, 1] without copy penalty."""

    type: Literal["dino"] = "dino"  # pyright: ignore[reportIncompatibleVariableOverride]

    preprocessing: Literal["published", "checkpoint"] = "published"
    """published = shortest edge to 256, bicubic, the central 224, ImageNet's mean and std, as DINO
    was evaluated; checkpoint = what its preprocessor_config.json says."""

    def build(self, device: torch.device) -> IdentityReward:
        """Loads 'facebook/dino-vits16' or its like."""
        from transformers import ViTModel

        return IdentityReward.load(
            self,
            ViTModel,
            lambda model, pixels: model(pixels).last_hidden_state[:, 0],
            device,
            PUBLISHED if self.preprocessing == "published" else None,
            unused="pooler.",  # DINO's checkpoints have none
        )
