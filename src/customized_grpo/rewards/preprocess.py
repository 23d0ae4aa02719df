"""Image preprocessing of the reward models in torch: batched, on the device, no torchvision.

Same arithmetic as the Hugging Face processors up to their rounding to uint8.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from customized_grpo.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """Resize the shortest edge, crop the centre, normalise."""

    resize: int
    """Pixels of the shortest edge."""
    crop: int
    """Side of the central square."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_pretrained(cls, path: str) -> Preprocessing:
        """Reads ``preprocessor_config.json`` of a folder or hub id."""
        from huggingface_hub import hf_hub_download

        name = "preprocessor_config.json"
        try:
            file = Path(path) / name if Path(path).is_dir() else Path(hf_hub_download(path, name))
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"path: {path!r} has no readable {name}: {error}") from error
        size = config["size"]
        resize = size["shortest_edge"] if "shortest_edge" in size else size["height"]
        return cls(
            resize=resize,
            crop=config.get("crop_size", {}).get("height", resize),
            mean=tuple(config["image_mean"]),
            std=tuple(config["image_std"]),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] -> ``[B, 3, crop, crop]`` normalised."""
        height, width = images.shape[-2:]
        short = min(height, width)
        shape = (self.resize * height // short, self.resize * width // short)
        if shape != (height, width):
            images = F.interpolate(
                images, shape, mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        top, left = (shape[0] - self.crop) // 2, (shape[1] - self.crop) // 2
        cropped = images[..., top : top + self.crop, left : left + self.crop]
        mean, std = (
            torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (self.mean, self.std)
        )
        return (cropped - mean) / std
