"""FLUX.1's transformer, VAE and text encoders (Black Forest Labs), whatever the references do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from customized_grpo.errors import ConfigError
from customized_grpo.generators.base import Conditioning
from customized_grpo.generators.cpu import cut_to_targets, use_cpu_blocks
from customized_grpo.generators.pipeline import PipelineConfig, PipelineGenerator, Size
from customized_grpo.types import Example

_NATIVE_SIZE = 1024


class ReferenceScheme(Protocol):
    """How a model that was built on FLUX.1 shows references to the transformer."""

    max_references: int

    def offset(self, number: int, target: Size, before: Sequence[Size]) -> tuple[int, int, int]:
        """Where the position ids of reference ``number`` start, in tokens; sizes are in tokens."""
        ...

    def sequence_length(self, target: Size) -> int:
        """Number by which the schedule is shifted; ``target`` in tokens."""
        ...


class Flux1Generator(PipelineGenerator):
    """Adapter: latents are packed ``[B, H W / 256, 4 C]``, C the channels of the VAE."""

    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")

    def __init__(
        self, pipeline: Any, config: PipelineConfig, device: torch.device, scheme: ReferenceScheme
    ) -> None:
        native = pipeline.vae.config.get("sample_size", _NATIVE_SIZE)  # TAEF1's config has none
        super().__init__(pipeline, config, device, native)
        self.max_references = scheme.max_references
        self._scheme = scheme
        limit: int = pipeline.tokenizer_2.model_max_length
        self._max_sequence_length = config.max_sequence_length or limit
        if device.type == "cpu":
            pipeline.vae.to(memory_format=torch.channels_last)
            if config.attention == "auto":
                use_cpu_blocks(self.transformer, self.grid[0] * self.grid[1])

    def _check_guidance(self, scale: float | None) -> float | None:
        distilled: bool = self.pipeline.transformer.config.guidance_embeds
        if distilled and scale is None:
            raise ConfigError("guidance_scale: this checkpoint needs one, e.g. 2.5")
        if not distilled and scale is not None:
            raise ConfigError(
                f"guidance_scale: this checkpoint has no guidance, got {scale}; remove it"
            )
        return scale

    def _encode_text(self, example: Example) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        embeds, pooled, text_ids = self.pipeline.encode_prompt(
            prompt=example.prompt,
            prompt_2=None,
            device=self.device,
            max_sequence_length=self._max_sequence_length,
        )
        per_sample = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        return per_sample, {"txt_ids": text_ids}

    def _encode_images(self, images: Tensor) -> Tensor:
        from diffusers.pipelines.flux.pipeline_flux_kontext import retrieve_latents

        vae = self.pipeline.vae
        latents = retrieve_latents(vae.encode(images.to(vae.dtype) * 2 - 1), sample_mode="argmax")
        return self._pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)

    def _pack(self, latents: Tensor) -> Tensor:
        return self.pipeline._pack_latents(latents, *latents.shape)

    def _positions(self, sizes: Sequence[Size]) -> dict[str, Tensor]:
        grids = [(height // self.patch, width // self.patch) for height, width in sizes]
        ids = [self._grid_ids(self.grid, (0, 0, 0))]
        for number, grid in enumerate(grids):
            ids.append(self._grid_ids(grid, self._scheme.offset(number, self.grid, grids[:number])))
        return {"img_ids": torch.cat(ids)}

    def _grid_ids(self, grid: Size, offset: tuple[int, int, int]) -> Tensor:
        ids: Tensor = self.pipeline._prepare_latent_image_ids(1, *grid, self.device, torch.float32)
        return ids + torch.tensor(offset, dtype=torch.float32, device=self.device)

    def _mu(self, num_steps: int) -> float:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        scheduler = self.pipeline.scheduler.config
        return calculate_shift(
            self._scheme.sequence_length(self.grid),
            scheduler.base_image_seq_len,
            scheduler.max_image_seq_len,
            scheduler.base_shift,
            scheduler.max_shift,
        )

    def _predict(self, hidden: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        inputs = dict(conditioning.per_sample)
        del inputs["reference_latents"]
        if self._guidance is not None:
            inputs["guidance"] = torch.full_like(sigma, self._guidance)
        # Pictures of several sizes share the transformer.
        cut_to_targets(self.transformer, self.grid[0] * self.grid[1])
        return self.transformer(
            hidden_states=hidden,
            timestep=sigma,
            return_dict=False,
            **inputs,
            **conditioning.shared,
        )[0]

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        unpacked = self.pipeline._unpack_latents(
            latents, self.height, self.width, self.pipeline.vae_scale_factor
        )
        unpacked = unpacked / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(unpacked.to(vae.dtype)).sample
