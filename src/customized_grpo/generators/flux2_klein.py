"""FLUX.2 [klein] (Black Forest Labs) through the stock Flux2KleinPipeline."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from customized_grpo.config.text_limits import TextLimit, tokenizer_limit
from customized_grpo.errors import ConfigError
from customized_grpo.generators.base import Conditioning
from customized_grpo.generators.flux2 import Flux2LatentsGenerator
from customized_grpo.generators.pipeline import PipelineConfig, Size, load_pipeline, loading
from customized_grpo.types import Example

logger = logging.getLogger("customized_grpo")

_NATIVE_SIZE = 1024
_TEXT_TOKENS = 512  # tokenizer_max_length of the pipeline
_CONVERSATION = 12  # tokens of Qwen3's chat template around a prompt, without thinking
LORA_TARGETS = re.compile(
    r"\.attn\.(to_[qkv]|add_[qkv]_proj|to_add_out|to_out\.0|to_qkv_mlp_proj)$"
    r"|single_transformer_blocks\.\d+\.attn\.to_out$"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Flux2KleinConfig(PipelineConfig):
    """A FLUX.2 [klein] checkpoint: distilled (no guidance_scale), or a base model (e.g. 4).

    Hub ids: 'black-forest-labs/FLUX.2-klein-4B' and '...-9B', '...-base-4B' and '...-base-9B'.
    """

    is_guided_by_text: ClassVar[bool] = True

    type: Literal["flux2-klein"] = "flux2-klein"
    text_layers: tuple[int, ...] = (9, 18, 27)
    """Hidden states of the text encoder that become the embedding."""

    def check(self) -> None:
        """See Plug; RL on distilled models is what maintainers of three trainers advise against."""
        PipelineConfig.check(self)
        if self.guidance_scale is None:
            logger.warning(
                "guidance_scale: null is for a distilled checkpoint, whose pictures RL may blur "
                "(Flow-Factory #192 and #225, DiffusionNFT #45); train a base model, such as "
                "black-forest-labs/FLUX.2-klein-base-4B with guidance_scale 4"
            )

    def text_limit(self) -> TextLimit | None:
        """See Plug: a conversation of the prompt alone."""
        most = self.max_sequence_length or _TEXT_TOKENS
        return tokenizer_limit(self.path, "tokenizer", most, around=_CONVERSATION)

    def build(self, device: torch.device) -> Flux2KleinGenerator:
        """Loads the pipeline onto the device."""
        from diffusers import Flux2KleinPipeline

        with loading(self):
            return Flux2KleinGenerator(load_pipeline(self, Flux2KleinPipeline), self, device)


class Flux2KleinGenerator(Flux2LatentsGenerator):
    """Adapter: a base model is guided by the empty prompt, two passes of the transformer a step."""

    max_references = 4

    def __init__(self, pipeline: Any, config: Flux2KleinConfig, device: torch.device) -> None:
        super().__init__(pipeline, config, device, _NATIVE_SIZE)
        self.lora_targets = tuple(
            name
            for name, module in self.transformer.named_modules()
            if isinstance(module, nn.Linear) and LORA_TARGETS.search(f".{name}")
        )
        self._text_layers = config.text_layers
        self._max_sequence_length = config.max_sequence_length or pipeline.tokenizer_max_length
        if not pipeline.config.is_distilled:  # evaluation may be guided where training is not
            with torch.no_grad(), self._at_work(*self.text_encoders):
                self._empty_prompt = self._embed("")[0]

    def _check_guidance(self, scale: float | None) -> float | None:
        if self.pipeline.config.is_distilled and scale is not None:
            raise ConfigError(
                f"guidance_scale: this checkpoint is distilled, got {scale}; remove it"
            )
        if not self.pipeline.config.is_distilled and scale is None:
            raise ConfigError(
                "guidance_scale: a base model needs one, e.g. 4; 1 is without guidance"
            )
        return super()._check_guidance(scale)

    def _encode_text(self, example: Example) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        embeds, text_ids = self._embed(example.prompt)
        return {"encoder_hidden_states": embeds}, {"txt_ids": text_ids[0]}

    def _embed(self, prompt: str) -> tuple[Tensor, Tensor]:
        return self.pipeline.encode_prompt(
            prompt=prompt,
            device=self.device,
            max_sequence_length=self._max_sequence_length,
            text_encoder_out_layers=self._text_layers,
        )

    def _positions(self, sizes: Sequence[Size]) -> dict[str, Tensor]:
        shapes = [(1, 1, height // self.patch, width // self.patch) for height, width in sizes]
        target = self.pipeline._prepare_latent_ids(torch.empty(1, 1, *self.grid))[0]
        references = self.pipeline._prepare_image_ids([torch.empty(shape) for shape in shapes])[0]
        return {"img_ids": torch.cat([target, references]).to(self.device)}

    def _mu(self, num_steps: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return compute_empirical_mu(self.grid[0] * self.grid[1], num_steps)

    def _predict(self, hidden: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        def predict(embeds: Tensor) -> Tensor:
            return self.transformer(
                hidden_states=hidden,
                timestep=sigma,
                encoder_hidden_states=embeds,
                return_dict=False,
                **conditioning.shared,
            )[0]

        embeds = conditioning.per_sample["encoder_hidden_states"]
        positive = predict(embeds)
        if self._guidance is None:
            return positive
        unguided = predict(self._empty_prompt.to(embeds.dtype).expand(len(hidden), -1, -1))
        return unguided + self._guidance * (positive - unguided)
