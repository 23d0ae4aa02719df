"""A transformer whose text and references are computed once, Qwen-Image-2.1's, on fake tensors.

Its own forward asks for the places of pictures by value, which fake tensors do not have. Here its
blocks are run by the lengths of the parts alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from customized_grpo.generators.prefix import Layers
from customized_grpo.tools.estimate.autocast import cuda_autocast

KIND = "QwenImage21Transformer2DModel"
_TOKENS_PER_SLOT = 4  # of the transformer, for a picture's token in the text encoder

_Segment = tuple[int, int, bool]  # start, end, whether it is text


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefixed:
    """Passes of one sample with ``text`` embeddings, those of pictures included."""

    model: Any
    target: int
    references: tuple[int, ...]
    text: int
    autocast: bool

    def prefix(self) -> Layers:
        """Keys and values of text and references."""
        segments, end = list[_Segment](), 0
        for count in self.references:
            segments.append((end, end + count, False))
            end += count
        words = self.text - sum(self.references) // _TOKENS_PER_SLOT
        segments.append((end, end + words, True))
        cache = self._cache()
        self._blocks(end + words + _TOKENS_PER_SLOT, cache, slice(0, end + words), segments)
        return [(layer.k, layer.v) for layer in cache.layer_caches]

    def velocity(self, layers: Layers) -> Tensor:
        """Of the target, which sees the prefix."""
        cache = self._cache()
        for layer, (keys, values) in zip(cache.layer_caches, layers, strict=True):
            layer.store(keys, values)
        return self._blocks(self.target, cache)

    def _cache(self) -> Any:
        from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

        return QwenImage21KVCache(len(self.model.transformer_blocks))

    def _blocks(
        self,
        length: int,
        cache: Any,
        written: slice | None = None,
        segments: list[_Segment] | None = None,
    ) -> Tensor:
        """Output of the last ``length`` tokens, which write keys and values or read others'."""
        model, config, mode = self.model, self.model.config, "extract" if written else "cached"
        dtype = torch.float32 if self.autocast else model.dtype
        pixels = sum(self.references) + (_TOKENS_PER_SLOT if written else self.target)
        with cuda_autocast(enabled=self.autocast):
            # Each pass projects everything, as the model's own forward does.
            pictures = model.img_in(torch.empty(1, pixels, config.in_channels, dtype=dtype))
            text = model.txt_in(torch.empty(1, self.text, config.context_in_dim, dtype=dtype))
            hidden = torch.cat([text, pictures], 1)[:, -length:]
            times = model.time_text_embed(torch.empty(2, dtype=hidden.dtype), hidden)
            modulation = model.modulation(times)
            angles = torch.empty(length, config.attention_head_dim // 2, dtype=torch.complex64)
            is_target = torch.empty(length, dtype=torch.bool)
            for number, block in enumerate(model.transformer_blocks):
                layer = cache.get_layer(number)
                given = hidden, modulation, angles, None, is_target, layer, mode, written, segments
                if torch.is_grad_enabled() and model.gradient_checkpointing:
                    hidden = model._gradient_checkpointing_func(block, *given)
                else:
                    hidden = block(*given)
            return model.proj_out(model.norm_out(hidden, times, is_target))
