"""Qwen-Image-2.1 (Qwen) through the stock QwenImage21Pipeline.

Text and references come before the target in one causal sequence and are modulated as if at noise
level 0 (``causal_condition``): their keys and values depend on no step and on no sample. They are
computed once for all steps and samples of a prompt, in the rollout and, with gradients, in the
update.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from customized_grpo.buckets import bucket_for
from customized_grpo.config.limits import Area
from customized_grpo.config.text_limits import TextLimit, tokenizer_limit
from customized_grpo.errors import DataError
from customized_grpo.generators.base import Conditioning
from customized_grpo.generators.pipeline import (
    PipelineConfig,
    PipelineGenerator,
    Size,
    load_pipeline,
    loading,
)
from customized_grpo.generators.prefix import Layers, Prefixes
from customized_grpo.generators.qwen import (
    chat_tokenizer,
    cut,
    denormalised,
    image_processor,
    shift,
)
from customized_grpo.generators.rows import Known, in_passes
from customized_grpo.pictures import to_pil
from customized_grpo.types import Example

_NATIVE_SIZE = 1024
_SLOT = 32  # pixels of a side of a slot: a token of the text encoder, 2 x 2 of the transformer
TOKENS_PER_SLOT = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class QwenImage21Config(PipelineConfig):
    """A Qwen-Image-2.1 checkpoint, made to be used without guidance; with a guidance_scale above 1
    a blank prompt guides.

    Hub id: 'Qwen/Qwen-Image-2.1'.
    """

    is_guided_by_text: ClassVar[bool] = True

    type: Literal["qwen-image-2.1"] = "qwen-image-2.1"
    reference_area: Area = 1024 * 1024
    """Pixels at which text encoder and VAE see a reference, whatever its shape."""

    def reference_size(self, image: Size, target: Size, count: int, multiple: int) -> Size:
        """See PipelineConfig: an area of its own."""
        return bucket_for(*image, self.reference_area, multiple)

    def picture_tokens(self, references: int) -> int:
        """See PipelineConfig."""
        return references * round(self.reference_area / _SLOT**2)

    def text_limit(self) -> TextLimit | None:
        """See Plug: there is none unless the config sets one."""
        if (most := self.max_sequence_length) is None:
            return None
        return tokenizer_limit(self.path, "processor", most, around=0)

    def build(self, device: torch.device) -> QwenImage21Generator:
        """Loads the pipeline onto the device."""
        from diffusers import QwenImage21Pipeline

        with loading(self):
            processor = _processor(self.path)
            pipeline = load_pipeline(self, QwenImage21Pipeline, processor=processor)
            return QwenImage21Generator(pipeline, self, device)


class QwenImage21Generator(PipelineGenerator):
    """Adapter: latents are ``[B, H W / 256, C]``; text encoder and VAE see the references.

    The samples of a prompt are one pass of the transformer, and every prompt has its own: a padded
    text would move the target's positions. Guided, it is twice as many.
    """

    latents_per_token = 1
    tokens_per_step = 2
    max_references = 10

    def __init__(self, pipeline: Any, config: QwenImage21Config, device: torch.device) -> None:
        super().__init__(pipeline, config, device, _NATIVE_SIZE)
        self._limit = config.max_sequence_length
        self._known = Known()
        self._prefixes: Prefixes | None = None
        self._is_base = False

    def check(self, example: Example) -> None:
        """See the Protocol. The text encoder would resize other pictures, and its tokens of them
        would not be the transformer's."""
        super().check(example)
        size = self.pipeline.processor.image_processor.size
        least, most = size["shortest_edge"], size["longest_edge"]
        for image in example.references:
            height, width = self._size_of(image, len(example.references))
            if not least <= height * width <= most:
                raise DataError(
                    f"example {example.id!r}: {self.config.type} sees references of {least} to "
                    f"{most} pixels, got {height} x {width}; change generator.reference_area"
                )

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """See Keeping."""
        self._prefixes = Prefixes()
        try:
            yield
            self._prefixes.keep_only(())
        finally:
            self._prefixes = None

    @contextmanager
    def base_policy(self) -> Iterator[None]:
        """See the Protocol."""
        with super().base_policy():
            self._is_base = True
            try:
                yield
            finally:
                self._is_base = False

    def _encode_text(self, example: Example) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        count = len(example.references)
        pictures = [to_pil(self._sized(image, count)) for image in example.references]
        prompt = cut(self.pipeline.processor.tokenizer, example.prompt, self._limit)
        texts = {"positive": prompt} | ({} if self._guidance is None else {"negative": " "})
        per_sample = {"example": torch.tensor([_digest(example)], device=self.device)}
        places = torch.empty(0)
        for name, text in texts.items():
            # The blank prompt's slots are where the prompt's are: the pictures come first.
            embeds, _, is_slot = self.pipeline._get_qwen_prompt_embeds(
                [text], pictures, self.device
            )
            length = torch.tensor([embeds.shape[1]], device=self.device)
            per_sample |= {name: embeds, f"{name}_length": length}
            places = is_slot[0].nonzero()[:, 0]
        return per_sample, {"slots": places}

    def _encode_images(self, images: Tensor) -> Tensor:
        opaque = torch.cat([images, torch.ones_like(images[:, :1])], 1)
        frames = (opaque.to(self.pipeline.vae.dtype) * 2 - 1).unsqueeze(2)
        return self._pack(self.pipeline._encode_vae_image(frames, generator=None))

    def _pack(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    def _positions(self, sizes: Sequence[Size]) -> dict[str, Tensor]:
        grids = [(height // self.patch, width // self.patch) for height, width in sizes]
        return {"img_shapes": torch.tensor([(1, *grid) for grid in [*grids, self.grid]])}

    def _mu(self, num_steps: int) -> float:
        return shift(self.pipeline.scheduler, self.grid)

    def _predict(self, hidden: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        if self._prefixes is not None:
            known = self._known.on_host(conditioning.per_sample, "example")
            self._prefixes.keep_only(set(known))
        positive = self._by_example("positive", hidden, sigma, conditioning)
        if self._guidance is None:
            return positive
        unguided = self._by_example("negative", hidden, sigma, conditioning)
        return unguided + self._guidance * (positive - unguided)

    def _by_example(
        self, name: str, hidden: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Velocities ``[B, S, C]``: a pass for the samples of each example."""
        given = conditioning.per_sample
        examples = self._known.on_host(given, "example")
        lengths = self._known.on_host(given, f"{name}_length")

        def run(rows: list[int]) -> Tensor:
            index, first = torch.tensor(rows, device=hidden.device), rows[0]
            text = given[name][index, : lengths[first]]
            key = examples[first], (name, self._is_base)
            return self._one(key, hidden[index], sigma[index], text, conditioning.shared)

        return in_passes(self.transformer, examples, run)

    def _one(
        self,
        key: tuple[int, tuple[Any, ...]],
        hidden: Tensor,
        sigma: Tensor,
        text: Tensor,
        shared: Mapping[str, Tensor],
    ) -> Tensor:
        """Velocities ``[b, S, C]`` of samples of one example."""
        count = math.prod(self.grid)
        target, references = hidden[:, :count], hidden[:, count:]
        model: Any = self.pipeline.transformer
        caching = {}
        if model.config.causal_condition and not isinstance(model, FSDPModule):
            make = partial(self._prefix, references[:1], text[:1], shared)
            layers = make() if self._prefixes is None else self._prefixes.get(*key, make)
            caching = {"kv_cache": _cache(layers, len(hidden)), "kv_cache_mode": "cached"}
        images, shapes = torch.cat([references, target], 1), self._shapes(shared)
        return self._run(images, sigma, text, shared, shapes, **caching)[:, -count:]

    def _prefix(self, references: Tensor, text: Tensor, shared: Mapping[str, Tensor]) -> Layers:
        """Of one example. It sees nothing of the target: the smallest one stands in for it."""
        from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

        blank = references.new_zeros(1, TOKENS_PER_SLOT, references.shape[2])
        shapes = [*self._shapes(shared)[:-1], (1, self.tokens_per_step, self.tokens_per_step)]
        cache = QwenImage21KVCache(len(self.pipeline.transformer.transformer_blocks))
        caching = {"kv_cache": cache, "kv_cache_mode": "extract"}
        zero = references.new_zeros(1)
        self._run(torch.cat([references, blank], 1), zero, text, shared, shapes, **caching)
        return [cast(Any, (layer.k, layer.v)) for layer in cache.layer_caches]

    def _run(
        self,
        images: Tensor,
        sigma: Tensor,
        text: Tensor,
        shared: Mapping[str, Tensor],
        shapes: list[tuple[int, ...]],
        **caching: Any,
    ) -> Tensor:
        slots = math.prod(shapes[-1]) // TOKENS_PER_SLOT  # of the target, after the text
        is_slot = torch.zeros(1, text.shape[1] + slots, dtype=torch.bool, device=text.device)
        is_slot[:, shared["slots"]] = True
        is_slot[:, text.shape[1] :] = True
        return self.transformer(
            hidden_states=images,
            timestep=sigma,
            encoder_hidden_states=text,
            img_shapes=[shapes] * len(images),
            img_mask=is_slot,
            return_dict=False,
            **caching,
        )[0]

    def _shapes(self, shared: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._known.on_host(shared, "img_shapes")]

    def _decode(self, latents: Tensor) -> Tensor:
        """What is transparent is white, as the text encoder sees it."""
        vae = self.pipeline.vae
        spatial = latents.transpose(1, 2).unflatten(2, (1, *self.grid))
        pixels = vae.decode(denormalised(vae, spatial)).sample[:, :, 0].float()
        opacity = (pixels[:, 3:] / 2 + 0.5).clamp(0, 1)
        return pixels[:, :3] * opacity + 1 - opacity


def _cache(layers: Layers, count: int) -> Any:
    """diffusers' cache for ``count`` samples of one prefix."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    cache = QwenImage21KVCache(len(layers))
    for layer, (keys, values) in zip(cache.layer_caches, layers, strict=True):
        layer.store(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1))
    return cache


def _digest(example: Example) -> int:
    """A number for prompt and references, which tells examples of a batch apart."""
    digest = hashlib.sha256(example.prompt.encode())
    for reference in example.references:
        digest.update(f"\n{tuple(reference.shape)}\n".encode())
        digest.update(reference.contiguous().cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], signed=True)


def _processor(path: str) -> Any:
    """The stock processor but for videos, for which it needs torchvision."""
    from transformers import Qwen3VLProcessor

    class Processor(Qwen3VLProcessor):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return type(argument)

    tokenizer = chat_tokenizer(path, "processor")
    return Processor(
        image_processor=image_processor(path),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
