"""HPS v2.1: how much would people like the picture for the prompt? (arXiv:2306.09341)"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from customized_grpo.assets import one_line, resolve_checkpoint
from customized_grpo.config import Checkpoint, RewardConfig, find_checkpoints
from customized_grpo.config.text_limits import TextLimit
from customized_grpo.rewards.dual_encoder import DualEncoder, PromptReward, text_limit
from customized_grpo.rewards.loading import (
    freeze,
    load_layout,
    load_tokenizer,
    read_tensors,
)
from customized_grpo.rewards.preprocess import Preprocessing


@dataclass(frozen=True, kw_only=True, slots=True)
class Hpsv2Config(RewardConfig):
    """Cosine similarity of image and prompt in an open_clip ViT-H/14 tuned on human preferences."""

    type: Literal["hpsv2"] = "hpsv2"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: str = "xswu/HPSv2"
    """Folder or hub id with the weights."""
    file: str = "HPS_v2.1_compressed.pt"
    """Weights in open_clip's layout: safetensors, or a .pt file of nothing but tensors."""
    clip: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Folder or hub id of the CLIPModel that was tuned; gives shapes, tokenizer, mean and std."""

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """See Plug."""
        return find_checkpoints(self, {"path": "model", "clip": "texts"}, {"path": self.file})

    def text_limit(self) -> TextLimit | None:
        """See Plug."""
        return text_limit(self.clip, self.clip)

    def build(self, device: torch.device) -> PromptReward:
        """Loads weights, tokenizer and preprocessing."""
        from transformers import CLIPConfig, CLIPModel

        with one_line(f"clip: {self.clip!r} is not a CLIPModel checkpoint"):
            config = CLIPConfig.from_pretrained(resolve_checkpoint(self.clip, "clip"))
        what = f"path: {self.file} of {self.path!r} does not fit {self.clip!r}"
        with one_line(what):
            state = convert_open_clip(read_tensors(self.path, self.file))
        model: Any = freeze(load_layout(lambda: CLIPModel(config), state, what), device)
        side = model.config.vision_config.image_size
        preprocess = dataclasses.replace(  # the authors fit the whole picture into the square
            Preprocessing.from_pretrained(self.clip, "clip"),
            fit="longest",
            size=(side, side),
            crop=(side, side),
        )
        tokenizer = load_tokenizer(self.clip, "clip")
        what = f"clip: {self.clip!r}"
        return PromptReward(DualEncoder(model, tokenizer, preprocess, "longest", what))


_NAMES = {
    r"^visual\.class_embedding$": "vision_model.embeddings.class_embedding",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^visual\.proj$": "visual_projection.weight",
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"^text_projection$": "text_projection.weight",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"\.ln_(\d)\.": r".layer_norm\1.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
    r"\.attn\.": ".self_attn.",
}


def convert_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of open_clip's CLIP under the names and in the shapes of CLIPModel.

    open_clip keeps query, key and value in one matrix and multiplies projections from the right.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in _NAMES.items():
            name = re.sub(pattern, replacement, name)
        if fused := re.fullmatch(r"(.+self_attn\.)in_proj_(weight|bias)", name):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{fused[1]}{part}_proj.{fused[2]}"] = rows.contiguous()
        else:
            transposed = name in ("visual_projection.weight", "text_projection.weight")
            converted[name] = tensor.T.contiguous() if transposed else tensor
    return converted
