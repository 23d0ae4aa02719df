"""Image preprocessing of the reward models in torch: batched, on the device, no torchvision.

Same arithmetic as the Hugging Face processors up to their rounding to uint8. Images are
``[B, 3, H, W]`` in [0, 1] throughout; NaN pixels stay NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from customized_grpo.assets import one_line, resolve_checkpoint
from customized_grpo.errors import ConfigError
from customized_grpo.rewards.loading import find_file

Fit = Literal["shortest", "longest", "exact", "none"]
Mode = Literal["bilinear", "bicubic"]

_MAX_SIDE = 4096  # of a model's input
_MODES: dict[int, Mode] = {2: "bilinear", 3: "bicubic"}  # numbers of PIL.Image.Resampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """Resize, cut or pad to the centre, scale, normalise."""

    fit: Fit
    """What ``size`` is: the shortest edge, the longest edge, the exact shape; none = no resize."""
    size: tuple[int, int]
    """Height and width; of an edge, the same number twice."""
    crop: tuple[int, int] | None = None
    """Height and width of the centre that is kept; what lies outside of the image is black."""
    mode: Mode = "bicubic"
    scale: float = 1.0
    """Factor on values in [0, 1] before they are normalised."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_pretrained(cls, path: str, field: str = "path") -> Preprocessing:
        """Reads ``preprocessor_config.json`` of a folder, hub id or ``embedded:NAME``.

        Raises:
            ConfigError: if there is none, or it asks for what cannot be done here.
        """
        config = read_processor_config(path, field)
        try:
            return cls._of(config)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{field}: the preprocessor_config.json of {path!r} must describe a resize, a "
                f"central crop and a normalisation, got {type(error).__name__}: {error}; use "
                "another checkpoint, or write a reward of your own"
            ) from error

    @classmethod
    def _of(cls, config: dict[str, Any]) -> Preprocessing:
        if config.get("do_pad"):
            raise ValueError("do_pad: true")
        crop = config.get("crop_size") if config.get("do_center_crop") is not False else None
        if crop is not None:
            crop = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        fit, size = _fit(config["size"], default="exact" if crop is None else "shortest")
        if config.get("do_resize") is False:
            fit = "none"
        if not all(type(n) is int and 0 < n <= _MAX_SIDE for n in (*size, *(crop or ()))):
            raise ValueError(f"sides {size} and {crop}")
        if fit != "none" and crop is not None and (crop[0] > size[0] or crop[1] > size[1]):
            raise ValueError(f"crop_size {crop} above size {size}")
        normalises = config.get("do_normalize") is not False
        factor = (config.get("rescale_factor") or 1 / 255) * 255
        return cls(
            fit=fit,
            size=size,
            crop=crop,
            mode=_MODES[config["resample"]],
            scale=255.0 if config.get("do_rescale") is False else factor,
            mean=_channels(config["image_mean"]) if normalises else (0.0,) * 3,
            std=_channels(config["image_std"]) if normalises else (1.0,) * 3,
        )

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize."""
        if self.fit == "none":
            return height, width
        if self.fit == "exact":
            return self.size
        if self.fit == "shortest":
            short = min(height, width)
            return self.size[0] * height // short, self.size[0] * width // short
        scale = self.size[0] / max(height, width)
        return round(height * scale), round(width * scale)

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] -> ``[B, 3, h, w]`` float32."""
        images = resize(images.float(), self.shape(*images.shape[-2:]), self.mode)
        if self.crop is not None:
            images = _centre(images, *self.crop)
        return normalize(images * self.scale, self.mean, self.std)

    def stack(self, images: Sequence[Tensor]) -> Tensor:
        """Images ``[3, H, W]`` of any sizes -> ``[B, 3, h, w]``; needs a fixed output shape."""
        return torch.cat([self(image[None]) for image in images])


def blank(device: torch.device) -> Tensor:
    """A picture to try a model with."""
    return torch.full((1, 3, 64, 64), 0.5, device=device)


def read_processor_config(path: str, field: str = "path") -> dict[str, Any]:
    """``preprocessor_config.json`` of a folder, hub id or ``embedded:NAME``.

    Raises:
        ConfigError: if it is missing or no JSON.
    """
    name = "preprocessor_config.json"
    with one_line(f"{field}: {path!r} has no readable {name}"):
        file = find_file(resolve_checkpoint(path, field), name)
        return json.loads(file.read_text(encoding="utf-8"))


def _channels(values: Sequence[float]) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{values} for three channels")
    return numbers


def _fit(size: int | dict[str, int], default: Fit) -> tuple[Fit, tuple[int, int]]:
    """A bare number, as old files have it, is the shortest edge where the centre is cut out."""
    if isinstance(size, int):
        return default, (size, size)
    if "shortest_edge" in size:
        return "shortest", (size["shortest_edge"], size["shortest_edge"])
    return "exact", (size["height"], size["width"])


def resize(images: Tensor, shape: tuple[int, int], mode: Mode) -> Tensor:
    """Antialiased as PIL does it; the overshoot of bicubic is clipped to [0, 1]."""
    if images.shape[-2:] == shape:
        return images
    return F.interpolate(images, shape, mode=mode, antialias=True, align_corners=False).clamp(0, 1)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtracts the mean and divides by the std of each channel."""
    shift, scale = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
    return (images - shift) / scale


def _centre(images: Tensor, height: int, width: int) -> Tensor:
    missing_y, missing_x = height - images.shape[-2], width - images.shape[-1]
    top, left = int(missing_y / 2), int(missing_x / 2)  # negative: cut, rounded towards zero too
    return F.pad(images, (left, missing_x - left, top, missing_y - top))


def qwen2vl_patches(
    images: Tensor, *, num_pixels: int, patch: int, merge: int, temporal: int
) -> tuple[Tensor, Tensor]:
    """Patches ``[B * N, 3 * temporal * patch^2]`` and grid ``[B, 3]`` int64 (1, rows, columns).

    As Qwen2VLImageProcessor with min_pixels = max_pixels = ``num_pixels``: the size is the largest
    multiple of ``patch * merge`` near that many pixels, and patches that are merged are neighbours.
    """
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    count, _, height, width = images.shape
    shape = smart_resize(height, width, patch * merge, num_pixels, num_pixels)
    pixels = resize(images.float(), shape, "bicubic")
    pixels = normalize(pixels, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    rows, columns = shape[0] // patch, shape[1] // patch
    blocks = pixels.view(
        count, 3, rows // merge, merge, patch, columns // merge, merge, patch
    ).permute(0, 2, 5, 3, 6, 1, 4, 7)
    still = blocks.unsqueeze(6).expand(*blocks.shape[:6], temporal, patch, patch)
    grid = torch.tensor([[1, rows, columns]], device=images.device).expand(count, 3)
    return still.reshape(count * rows * columns, 3 * temporal * patch**2), grid


def naflex_patches(images: Tensor, config: dict[str, Any]) -> dict[str, Tensor]:
    """Inputs of a Siglip2Model, which keeps the aspect ratio; ``config`` of its processor."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import (
        get_image_size_for_max_num_patches,
    )

    patch, limit = config["patch_size"], config["max_num_patches"]
    count, _, height, width = images.shape
    shape = get_image_size_for_max_num_patches(height, width, patch, limit)
    pixels = resize(images.float(), shape, _MODES[config["resample"]])
    pixels = normalize(pixels, config["image_mean"], config["image_std"])
    rows, columns = shape[0] // patch, shape[1] // patch
    tiles = pixels.view(count, 3, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    flat = tiles.reshape(count, rows * columns, 3 * patch**2)
    mask = torch.arange(limit, device=images.device) < rows * columns
    return {
        "pixel_values": F.pad(flat, (0, 0, 0, limit - rows * columns)),
        "pixel_attention_mask": mask.int().expand(count, limit),
        "spatial_shapes": torch.tensor([[rows, columns]], device=images.device).expand(count, 2),
    }
