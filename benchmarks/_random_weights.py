"""Plugs with the shapes of published checkpoints and random weights: nothing is downloaded.

They are built where they will compute, in their own precision: 12 billion weights in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import diffusers
import torch
import transformers
from pydantic import PositiveInt
from torch import nn

from customized_grpo.assets import resolve_checkpoint
from customized_grpo.config import DataConfig, RunConfig
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.generators.flux_kontext import FluxKontextConfig, Kontext
from customized_grpo.rewards.clip_text import ClipTextConfig
from customized_grpo.rewards.dinov2 import Dinov2Config
from customized_grpo.rewards.dual_encoder import DualEncoder, PromptReward
from customized_grpo.rewards.identity import IdentityReward
from customized_grpo.rewards.loading import freeze, load_tokenizer
from customized_grpo.rewards.preprocess import Preprocessing
from customized_grpo.tools.estimate.architectures import Component
from customized_grpo.tools.estimate.checkpoints import pipeline_components, reward_component
from customized_grpo.types import Example

CLIP_L = "openai/clip-vit-large-patch14"
TEXT_TOKENS = 512  # FLUX.1's own limit
# Of black-forest-labs/FLUX.1-Kontext-dev: scheduler_config.json, and what the cost model has no use
# for in the VAE's config.json.
_SCHEDULE = {
    "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0, "use_dynamic_shifting": True,
    "base_image_seq_len": 256, "max_image_seq_len": 4096,
}  # fmt: skip
_VAE_SCALE = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


def with_random_weights(config: RunConfig) -> RunConfig:
    """A run of FLUX.1 Kontext with the shapes that its config names, and nothing to load.

    The rewards become a DINOv2 and a CLIP, whatever the prompt reward was.
    """
    generator: Any = config.generator
    given = {f.name: getattr(generator, f.name) for f in fields(generator) if f.name != "type"}
    given["max_sequence_length"] = generator.max_sequence_length or TEXT_TOKENS
    rewards: tuple[Any, ...] = config.rewards
    identity, prompt = (
        next(r for r in rewards if r.objective == o) for o in ("identity", "prompt")
    )
    text_path = prompt.path if isinstance(prompt, ClipTextConfig) else CLIP_L
    return replace(
        config,
        data=RandomPictures(side=generator.height),
        generator=RandomKontext(**given),
        rewards=(
            RandomDinov2(name="dinov2", objective="identity", path=identity.path),
            RandomClipText(name="clip-text", objective="prompt", path=text_path),
        ),
        evaluators=(),
        evaluation=replace(config.evaluation, validate_every=0),
    )


def random_model(component: Component, device: torch.device, dtype: torch.dtype) -> Any:
    """A model as its class initialises it."""
    kind, config = component
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            if hasattr(diffusers, kind):
                return getattr(diffusers, kind).from_config(config).eval()
            cls = getattr(transformers, kind)
            return cls(cls.config_class(**config)).eval()
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomKontext(FluxKontextConfig):
    """FLUX.1 Kontext; its texts are read by the tokenizers of the embedded generator."""

    type: str = "_random_weights:RandomKontext"  # pyright: ignore

    def build(self, device: torch.device) -> Flux1Generator:
        """See the base class."""
        parts: dict[str, nn.Module] = {}
        for name, (kind, config) in pipeline_components(self.path).items():
            config = {**_VAE_SCALE, **config} if name == "vae" else config
            part = random_model((kind, config), device, getattr(torch, self.dtype))
            parts[name] = part.to("cpu") if self.offload and name != "transformer" else part
        embedded = resolve_checkpoint("embedded:generator")
        pipeline = diffusers.FluxKontextPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**_SCHEDULE),
            tokenizer=load_tokenizer(f"{embedded}/tokenizer"),
            tokenizer_2=load_tokenizer(f"{embedded}/tokenizer_2"),
            **parts,  # pyright: ignore
        )
        for part in parts.values():
            part.requires_grad_(False)
        return Flux1Generator(pipeline, self, device, Kontext())


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomDinov2(Dinov2Config):
    """See the module."""

    type: str = "_random_weights:RandomDinov2"  # pyright: ignore

    def build(self, device: torch.device) -> IdentityReward:
        """See the base class."""
        model = _frozen(self.path, device)
        preprocess = _preprocessing(model.config.image_size)
        return IdentityReward(lambda pixels: model(pixels).pooler_output, preprocess, self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomClipText(ClipTextConfig):
    """See the module."""

    type: str = "_random_weights:RandomClipText"  # pyright: ignore

    def build(self, device: torch.device) -> PromptReward:
        """See the base class."""
        model = _frozen(self.path, device)
        preprocess = _preprocessing(model.config.vision_config.image_size)
        tokenizer = load_tokenizer("embedded:reward-clip")
        return PromptReward(DualEncoder(model, tokenizer, preprocess, "longest", self.path))


def _frozen(path: str, device: torch.device) -> Any:
    return freeze(random_model(reward_component(path), device, torch.float32), device)


def _preprocessing(side: int) -> Preprocessing:
    return Preprocessing(fit="exact", size=(side, side), mean=(0.5,) * 3, std=(0.5,) * 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomPictures(DataConfig):
    """Noise as references."""

    type: str = "_random_weights:RandomPictures"
    side: PositiveInt = 512

    def build(self, seed: int) -> _Pictures:
        """See the base class."""
        return _Pictures(self.side, seed)


class _Pictures:
    """See RandomPictures."""

    def __init__(self, side: int, seed: int) -> None:
        self._side, self._seed = side, seed

    def training(self, rollout: int, count: int) -> list[Example]:
        """See DataSource."""
        return [self._example(f"{rollout}-{number}") for number in range(count)]

    def listed(self) -> Sequence[Example]:
        """See DataSource."""
        return ()

    def held_out(self, count: int) -> list[Example]:
        """See DataSource."""
        return self.training(-1, count)

    def validation(self, count: int) -> list[Example]:
        """See DataSource."""
        return self.training(-2, count)

    def _example(self, name: str) -> Example:
        rng = torch.Generator().manual_seed(self._seed)
        picture = torch.rand(3, self._side, self._side, generator=rng)
        prompt = "a toy in the snow, with mountains behind it"
        return Example(id=name, prompt=prompt, references=(picture,), subject="toy")
