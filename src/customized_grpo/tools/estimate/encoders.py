"""Counts of what surrounds the transformer: VAE, text encoders, reward models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from customized_grpo.config import RewardConfig
from customized_grpo.tools.estimate.architectures import Component
from customized_grpo.tools.estimate.autocast import cuda_autocast
from customized_grpo.tools.estimate.checkpoints import parameters, reward_component, skeleton
from customized_grpo.tools.estimate.counting import Count, count, on_skeletons

_HPSV3_PICTURE = 256  # tokens
_REFERENCE_VIEWS = 3  # the subject alone, the whole, the whole without its background
_HPSV3_TOKENS = 1024  # of the picture, its long instruction and the prompt; assumed
_CHANNELS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderCount:
    """A model that is only read."""

    parameters: float
    flops: float
    peak: float  # bytes of activations

    @classmethod
    def of(cls, model: nn.Module, counted: Count, more: float = 0.0) -> EncoderCount:
        """What was counted of a model, and FLOPs that were not."""
        return cls(parameters=parameters(model), flops=counted.flops + more, peak=counted.peak)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardCount:
    """All rewards of a run."""

    bytes: float
    image_flops: float  # FLOPs of scoring one image
    example_flops: float  # FLOPs of one prompt and its references
    float32: float  # share of the FLOPs that are computed in float32; HPSv3's are in bfloat16
    peak: float  # bytes of activations for one image
    unknown: tuple[str, ...]  # rewards that were not counted


def count_vae(
    component: Component,
    size: tuple[int, int],
    references: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    autocast: bool,
) -> tuple[EncoderCount, EncoderCount]:
    """Decoding of one image, and encoding of one example's references; sizes in pixels."""
    vae = skeleton(component, dtype)
    is_video = "z_dim" in vae.config
    channels = vae.config.z_dim if is_video else vae.config.latent_channels
    halvings = vae.config.temperal_downsample if is_video else vae.config.block_out_channels[1:]
    colours = vae.config.get("in_channels", _CHANNELS)
    frames, factor = (1,) * is_video, 2 ** len(halvings)

    def decode() -> object:
        latents = torch.empty(1, channels, *frames, *(s // factor for s in size), dtype=dtype)
        with cuda_autocast(enabled=autocast and dtype == torch.float32):
            return vae.decode(latents)

    def encode() -> object:
        return [vae.encode(torch.empty(1, colours, *frames, *s, dtype=dtype)) for s in references]

    with on_skeletons, torch.no_grad():
        return EncoderCount.of(vae, count(decode)), EncoderCount.of(vae, count(encode))


def count_text_encoder(
    component: Component, tokens: int, picture_tokens: int, dtype: torch.dtype
) -> EncoderCount:
    """One prompt of ``tokens``, of which ``picture_tokens`` are pictures (Qwen-Image-Edit)."""
    model = skeleton(component, dtype)
    with on_skeletons, torch.no_grad():
        text = getattr(model, "model", model)
        text = getattr(text, "language_model", text)
        length = min(tokens, getattr(model.config, "max_position_embeddings", None) or tokens)
        counted = count(lambda: _read_text(text, length))
    return EncoderCount.of(model, counted, _vision_flops(model, picture_tokens))


def _read_text(model: Any, length: int) -> object:
    return model(input_ids=torch.empty(1, length, dtype=torch.int64))


def _vision_flops(model: Any, tokens: int) -> float:
    """FLOPs of a Qwen-VL's vision tower, by its weights alone: its windows depend on data."""
    tower = getattr(getattr(model, "model", None), "visual", None)
    if tower is None or not tokens:
        return 0.0
    mergers: list[nn.Module] = [tower.merger, *getattr(tower, "deepstack_merger_list", [])]
    patches = tokens * tower.config.spatial_merge_size**2
    merging = sum(parameters(merger) for merger in mergers)
    return 2.0 * ((parameters(tower) - merging) * patches + merging * tokens)


def count_rewards(rewards: Sequence[RewardConfig], references: int) -> RewardCount:
    """Reward models, in float32 as they are loaded (HPSv3: bfloat16); each is run for itself."""
    weights: dict[str, float] = {}  # bytes by checkpoint, which rewards share
    image = example = peak = half = 0.0
    unknown = []
    for config in rewards:
        path = _checkpoint(config)
        if path is None:
            unknown.append(config.label)
            continue
        per_image, per_example = _count_reward(config, path, references)
        is_half = getattr(config, "dtype", "float32") == "bfloat16"
        half += per_image.flops * is_half
        weights.setdefault(path, per_image.parameters * (2 if is_half else 4))
        if segmenter := getattr(config, "segmenter", None):
            model = skeleton(reward_component(segmenter), torch.float32)
            weights.setdefault(segmenter, 4.0 * parameters(model))
        image, example = image + per_image.flops, example + per_example
        peak = max(peak, per_image.peak)
    return RewardCount(
        bytes=sum(weights.values()), image_flops=image, example_flops=example,
        float32=1 - half / image if image else 1.0, peak=peak,
        unknown=tuple(unknown),
    )  # fmt: skip


def _checkpoint(config: RewardConfig) -> str | None:
    """Where the shape of a reward's model stands; None for those that run elsewhere.

    A file of bare weights has no shape: it is that of the model from which it was tuned. What finds
    the subject is no reward.
    """
    shapes = (
        c.path
        for c in config.checkpoints()
        if c.kind in ("model", "texts") and not c.file and c.field != "segmenter"
    )
    return next(shapes, None)


def _count_reward(config: RewardConfig, path: str, references: int) -> tuple[EncoderCount, float]:
    """One image, and the FLOPs of one example (its prompt or references)."""
    model = skeleton(reward_component(path), getattr(torch, getattr(config, "dtype", "float32")))
    with on_skeletons, torch.no_grad():
        if hasattr(getattr(model, "model", None), "language_model"):  # HPSv3
            read = count(lambda: _read_text(model.model.language_model, _HPSV3_TOKENS))
            return EncoderCount.of(model, read, _vision_flops(model, _HPSV3_PICTURE)), 0.0
        image = EncoderCount.of(model, count(lambda: _see(model)))
        if config.objective == "identity" or not hasattr(model, "text_model"):
            return image, _REFERENCE_VIEWS * references * image.flops
        length = model.config.text_config.max_position_embeddings
        return image, count(lambda: _read_text(model.text_model, length)).flops


def _see(model: Any) -> object:
    vision = getattr(model.config, "vision_config", model.config)
    pixels = torch.empty(1, _CHANNELS, vision.image_size, vision.image_size)
    if hasattr(model, "get_image_features"):
        return model.get_image_features(pixel_values=pixels)
    return model(pixel_values=pixels)
