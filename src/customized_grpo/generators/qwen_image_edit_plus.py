"""Qwen-Image-Edit-Plus (Qwen, arXiv:2508.02324) through the stock QwenImageEditPlusPipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from customized_grpo.buckets import bucket_for
from customized_grpo.config.limits import Area
from customized_grpo.config.text_limits import TextLimit, tokenizer_limit
from customized_grpo.errors import ConfigError
from customized_grpo.generators.base import Conditioning
from customized_grpo.generators.pipeline import (
    PipelineConfig,
    PipelineGenerator,
    Size,
    load_pipeline,
    loading,
)
from customized_grpo.generators.qwen import cut, denormalised, image_processor, shift
from customized_grpo.generators.rows import Known
from customized_grpo.types import Example

_NATIVE_SIZE = 1024
_MULTIPLE = 32  # of reference sizes in the stock pipeline
_TOKEN_SIDE = 28  # pixels of a token's side in the text encoder: patches of 14, merged 2 x 2
_PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class QwenImageEditPlusConfig(PipelineConfig):
    """A Qwen-Image-Edit-Plus checkpoint; guidance_scale (stock: 4) guides by a blank prompt,
    None or 1 is without guidance.

    Hub id: 'Qwen/Qwen-Image-Edit-2509' or a later one.
    """

    is_guided_by_text: ClassVar[bool] = True

    type: Literal["qwen-image-edit-plus"] = "qwen-image-edit-plus"
    reference_area: Area = 1024 * 1024
    """Pixels at which the VAE sees a reference, whatever its shape."""
    condition_area: Area = 384 * 384
    """Pixels at which the text encoder sees a reference."""

    def reference_size(self, image: Size, target: Size, count: int, multiple: int) -> Size:
        """See PipelineConfig: an area of its own."""
        return bucket_for(*image, self.reference_area, _MULTIPLE)

    def picture_tokens(self, references: int) -> int:
        """See PipelineConfig."""
        return references * round(self.condition_area / _TOKEN_SIDE**2)

    def check(self) -> None:
        """See Plug."""
        if self.attention == "flash":
            raise ConfigError(
                "attention: must not be 'flash', which takes no mask, and texts of a batch differ "
                "in length; use 'flash_varlen'"
            )
        PipelineConfig.check(self)

    def text_limit(self) -> TextLimit | None:
        """See Plug: there is none unless the config sets one."""
        if (most := self.max_sequence_length) is None:
            return None
        return tokenizer_limit(self.path, "tokenizer", most, around=0)

    def build(self, device: torch.device) -> QwenImageEditPlusGenerator:
        """Loads the pipeline onto the device."""
        from diffusers import QwenImageEditPlusPipeline

        self.check()
        with loading(self):
            pipeline = load_pipeline(self, QwenImageEditPlusPipeline, processor=None)
            return QwenImageEditPlusGenerator(pipeline, self, device)


class QwenImageEditPlusGenerator(PipelineGenerator):
    """Adapter: latents are packed ``[B, H W / 256, 4 C]``; the text encoder sees the references.

    Guided, a step takes two passes of the transformer.
    """

    max_references = 3

    def __init__(
        self, pipeline: Any, config: QwenImageEditPlusConfig, device: torch.device
    ) -> None:
        super().__init__(pipeline, config, device, _NATIVE_SIZE)
        self._condition_area = config.condition_area
        self._limit = config.max_sequence_length
        self._images = image_processor(config.path)
        self._known = Known()

    def _encode_text(self, example: Example) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        texts = {"positive": example.prompt}
        if self._guidance is not None:
            texts["negative"] = " "
        per_sample = {}
        for name, text in texts.items():
            embeds = self._embed(example, text)
            per_sample |= {
                name: embeds,
                f"{name}_length": torch.tensor([embeds.shape[1]], device=self.device),
            }
        return per_sample, {}

    def _embed(self, example: Example, prompt: str) -> Tensor:
        """Embeddings ``[1, L, D]`` without the system prompt."""
        inputs = self._inputs(example, prompt)
        hidden = self.pipeline.text_encoder(**inputs, output_hidden_states=True).hidden_states[-1]
        return hidden[:, self.pipeline.prompt_template_encode_start_idx :]

    def _inputs(self, example: Example, prompt: str) -> dict[str, Tensor]:
        """Arguments of the text encoder. ``mm_token_type_ids`` marks the pictures' tokens: the
        stock pipeline forgets it, and loses their positions (diffusers #14194)."""
        pictures = [self._picture(image) for image in example.references]
        processed = self._images(pictures, return_tensors="pt")
        grids = processed["image_grid_thw"]
        counts = (grids.prod(-1) // self._images.merge_size**2).tolist()
        seen = "".join(
            _PICTURE.format(number + 1).replace("<|image_pad|>", "<|image_pad|>" * count)
            for number, count in enumerate(counts)
        )
        text = self.pipeline.prompt_template_encode.format(
            seen + cut(self.pipeline.tokenizer, prompt, self._limit)
        )
        tokens = self.pipeline.tokenizer([text], return_tensors="pt")
        picture_token = self.pipeline.text_encoder.config.image_token_id
        inputs = {
            "input_ids": tokens.input_ids,
            "attention_mask": tokens.attention_mask,
            "mm_token_type_ids": (tokens.input_ids == picture_token).int(),
            "pixel_values": processed["pixel_values"],
            "image_grid_thw": grids,
        }
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _picture(self, image: Tensor) -> Any:
        """``[3, h, w]`` as a PIL image at the text encoder's size."""
        from PIL import Image

        _, tall, wide = image.shape
        height, width = bucket_for(tall, wide, self._condition_area, _MULTIPLE)
        pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        return self.pipeline.image_processor.resize(Image.fromarray(pixels), height, width)

    def _encode_images(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        frames = (images.to(vae.dtype) * 2 - 1).unsqueeze(2)
        latents = self.pipeline._encode_vae_image(frames, generator=None)
        return self._pack(latents.squeeze(2))

    def _pack(self, latents: Tensor) -> Tensor:
        return self.pipeline._pack_latents(latents, *latents.shape)

    def _positions(self, sizes: Sequence[Size]) -> dict[str, Tensor]:
        grids = [
            self.grid,
            *((height // self.patch, width // self.patch) for height, width in sizes),
        ]
        return {"img_shapes": torch.tensor([(1, *grid) for grid in grids])}

    def _mu(self, num_steps: int) -> float:
        return shift(self.pipeline.scheduler, self.grid)

    def _predict(self, hidden: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        shapes = [tuple(shape) for shape in self._known.on_host(conditioning.shared, "img_shapes")]

        def predict(name: str) -> Tensor:
            embeds, mask = self._text(conditioning.per_sample, name)
            return self.transformer(
                hidden_states=hidden,
                timestep=sigma,
                encoder_hidden_states=embeds,
                encoder_hidden_states_mask=mask,
                img_shapes=[shapes] * len(hidden),
                return_dict=False,
            )[0]

        positive = predict("positive")
        if self._guidance is None:
            return positive
        unguided = predict("negative")
        guided = unguided + self._guidance * (positive - unguided)
        return guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def _text(self, given: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
        """Embeddings ``[B, L, D]``, cut to the batch's longest text, and a mask ``[B, L]`` where
        others are shorter: with any mask, SDPA leaves its fastest kernels out."""
        lengths = self._known.on_host(given, f"{name}_length")
        embeds, longest = given[name][:, : max(lengths)], max(lengths)
        if min(lengths) == longest:
            return embeds, None
        places = torch.arange(longest, device=embeds.device)
        return embeds, places < given[f"{name}_length"][:, None]

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        unpacked = self.pipeline._unpack_latents(
            latents, self.height, self.width, self.pipeline.vae_scale_factor
        )
        return vae.decode(denormalised(vae, unpacked)).sample[:, :, 0]
