"""FLUX.1 Kontext (Black Forest Labs, arXiv:2506.15742) through the stock FluxKontextPipeline."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from customized_grpo.assets import resolve_checkpoint
from customized_grpo.config import GeneratorConfig
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.generators.attention import MAX_TOKENS, use_plain_attention
from customized_grpo.generators.base import Conditioning
from customized_grpo.generators.lora import LORA_FILE, adapters_disabled, save_lora
from customized_grpo.ops import shifted_sigmas
from customized_grpo.types import Example, crop_and_resize

if TYPE_CHECKING:
    from diffusers import FluxKontextPipeline

_FLUX_SIZE = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class FluxKontextConfig(GeneratorConfig):
    """A FLUX.1 Kontext checkpoint in diffusers format; its VAE may be the small TAEF1."""

    type: Literal["flux-kontext"] = "flux-kontext"
    path: str
    """Folder, hub id such as 'black-forest-labs/FLUX.1-Kontext-dev', or 'embedded:generator'."""
    height: PositiveInt | None = None
    """Pixels of output and reference; None: the checkpoint's native size."""
    width: PositiveInt | None = None
    """See height."""
    guidance_scale: NonNegativeFloat | None = None
    """For guidance-distilled checkpoints (FLUX.1 Kontext [dev]: 2.5); None where there is none."""
    max_sequence_length: PositiveInt | None = None
    """T5 tokens per prompt, longer ones are cut; None: the tokenizer's limit (512 for FLUX.1)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights; LoRA weights are always float32."""

    def build(self, device: torch.device) -> FluxKontextGenerator:
        """Loads the pipeline onto the device."""
        from diffusers import FluxKontextPipeline

        folder = resolve_checkpoint(self.path)
        try:
            pipeline = FluxKontextPipeline.from_pretrained(
                folder, dtype=getattr(torch, self.dtype), use_safetensors=True
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"path: {self.path!r} cannot be loaded as a FLUX.1 Kontext checkpoint in diffusers "
                "format (a hub id needs network or an earlier download, and gated models a login): "
                + " ".join(str(error).split())
            ) from error
        return FluxKontextGenerator(pipeline.to(device), self)


class FluxKontextGenerator:
    """Adapter: latents are packed ``[B, H W / 256, 4 C]``, C the channels of the VAE."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
                    "to_add_out")  # fmt: skip

    def __init__(self, pipeline: FluxKontextPipeline, config: FluxKontextConfig) -> None:
        self.pipeline = pipeline
        self.transformer = pipeline.transformer.eval()
        self.device = pipeline.device
        vae: Any = pipeline.vae
        native = vae.config.get("sample_size", _FLUX_SIZE)  # TAEF1's config has none
        self.height, self.width = config.height or native, config.width or native
        self._check_size()
        self._guidance = self._check_guidance(config.guidance_scale)
        limit: int = pipeline.tokenizer_2.model_max_length
        self._max_sequence_length = config.max_sequence_length or limit
        if self.device.type == "cpu":
            vae.to(memory_format=torch.channels_last)
            if self._max_sequence_length + len(self._image_ids()) <= MAX_TOKENS:
                use_plain_attention(self.transformer)

    def _check_size(self) -> None:
        multiple = 2 * self.pipeline.vae_scale_factor
        for name, value in (("height", self.height), ("width", self.width)):
            if value % multiple:
                raise ConfigError(f"{name}: must be a multiple of {multiple}, got {value}")

    def _check_guidance(self, scale: float | None) -> float | None:
        distilled: bool = self.pipeline.transformer.config.guidance_embeds  # pyright: ignore
        if distilled and scale is None:
            raise ConfigError("guidance_scale: this checkpoint needs one, e.g. 2.5")
        if not distilled and scale is not None:
            raise ConfigError(
                f"guidance_scale: this checkpoint has no guidance, got {scale}; remove it"
            )
        return scale

    def check(self, example: Example) -> None:
        """See the Protocol."""
        if len(example.references) != 1:
            raise DataError(
                f"example {example.id!r}: flux-kontext takes exactly one reference, "
                f"got {len(example.references)}"
            )

    @torch.no_grad()
    def encode(self, examples: Sequence[Example]) -> Conditioning:
        """See the Protocol. One reference each; other shapes are centre-cropped to the output's."""
        embeds, pooled, text_ids = cast("Any", self.pipeline).encode_prompt(
            prompt=[example.prompt for example in examples],
            prompt_2=None,
            device=self.device,
            max_sequence_length=self._max_sequence_length,
        )
        references = torch.stack([self._reference(example) for example in examples])
        reference_latents = self._encode_images(references.to(self.device))
        return Conditioning(
            per_sample={
                "encoder_hidden_states": embeds,
                "pooled_projections": pooled,
                "reference_latents": reference_latents,
            },
            shared={"txt_ids": text_ids, "img_ids": self._image_ids()},
        )

    def _reference(self, example: Example) -> Tensor:
        self.check(example)
        return crop_and_resize(example.references[0], self.height, self.width)

    def _encode_images(self, images: Tensor) -> Tensor:
        from diffusers.pipelines.flux.pipeline_flux_kontext import retrieve_latents

        vae: Any = self.pipeline.vae
        latents = retrieve_latents(vae.encode(images.to(vae.dtype) * 2 - 1), sample_mode="argmax")
        return self._pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)

    def _pack(self, latents: Tensor) -> Tensor:
        return self.pipeline._pack_latents(latents, *latents.shape)

    def _image_ids(self) -> Tensor:
        factor = 2 * self.pipeline.vae_scale_factor
        target: Tensor = self.pipeline._prepare_latent_image_ids(
            1, self.height // factor, self.width // factor, self.device, torch.float32
        )
        reference = target.clone()
        reference[:, 0] = 1
        return torch.cat([target, reference])

    def sigmas(self, num_steps: int, shift: float | None) -> Tensor:
        """See the Protocol; the default is the pipeline's resolution-dependent shift."""
        if shift is not None:
            return shifted_sigmas(num_steps, shift)
        import math

        from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift

        scheduler: Any = self.pipeline.scheduler.config
        tokens = self.height * self.width // (2 * self.pipeline.vae_scale_factor) ** 2
        mu = calculate_shift(
            tokens,
            scheduler.base_image_seq_len,
            scheduler.max_image_seq_len,
            scheduler.base_shift,
            scheduler.max_shift,
        )
        return shifted_sigmas(num_steps, math.exp(mu))

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """See the Protocol."""
        factor = self.pipeline.vae_scale_factor
        channels = self.pipeline.transformer.config.in_channels // 4  # pyright: ignore
        shape = (count, channels, self.height // factor, self.width // factor)
        return self._pack(torch.randn(shape, generator=generator)).to(self.device)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See the Protocol."""
        inputs = dict(conditioning.per_sample)
        reference = inputs.pop("reference_latents")
        if self._guidance is not None:
            inputs["guidance"] = torch.full_like(sigma, self._guidance)
        hidden = torch.cat([latents, reference.to(latents.dtype)], 1)
        if not torch.is_autocast_enabled(latents.device.type):
            hidden = hidden.to(self.pipeline.transformer.dtype)
        output = self.transformer(
            hidden_states=hidden,
            timestep=sigma,
            return_dict=False,
            **inputs,
            **conditioning.shared,
        )[0]
        return output[:, : latents.shape[1]].float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See the Protocol."""
        vae: Any = self.pipeline.vae
        unpacked = self.pipeline._unpack_latents(
            latents, self.height, self.width, self.pipeline.vae_scale_factor
        )
        unpacked = unpacked / vae.config.scaling_factor + vae.config.shift_factor
        return (vae.decode(unpacked.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    def base_policy(self) -> AbstractContextManager[None]:
        """See the Protocol."""
        return adapters_disabled(self.transformer)

    def save_weights(self, folder: Path) -> None:
        """See the Protocol: a LoRA file, or the whole transformer after full fine-tuning."""
        if getattr(self.transformer, "peft_config", None):
            save_lora(type(self.pipeline), self.transformer, folder)
        else:
            self.pipeline.transformer.save_pretrained(folder / "transformer")

    def load_weights(self, folder: Path) -> None:
        """See the Protocol."""
        if (folder / LORA_FILE).exists():
            self.pipeline.load_lora_weights(str(folder))
        else:
            from diffusers import FluxTransformer2DModel

            tuned = FluxTransformer2DModel.from_pretrained(folder / "transformer")
            self.transformer.load_state_dict(tuned.state_dict())
