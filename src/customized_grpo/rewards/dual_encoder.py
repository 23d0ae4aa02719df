"""Image and text towers with one feature space (CLIP, SigLIP), and the rewards that use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from customized_grpo.assets import is_there, one_line, resolve_checkpoint
from customized_grpo.config.text_limits import TextLimit, tokenizer_limit
from customized_grpo.rewards.base import distinct
from customized_grpo.rewards.loading import load_model, load_tokenizer
from customized_grpo.rewards.preprocess import (
    Preprocessing,
    blank,
    naflex_patches,
    read_processor_config,
)
from customized_grpo.types import Example

_MAX_BATCH = 64  # images per forward: bounds the memory, changes no score


class DualEncoder:
    """A CLIPModel, SiglipModel or Siglip2Model with its tokenizer and preprocessing.

    Raises:
        ConfigError: opened by ``what``, if the three do not go together, which is tried.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        preprocess: Callable[[Tensor], Tensor | dict[str, Tensor]],
        padding: Literal["longest", "max_length"],
        what: str,
    ) -> None:
        self.model, self._tokenizer, self._preprocess = model, tokenizer, preprocess
        self._padding = padding
        with one_line(f"{what} does not work"), torch.no_grad():
            self.images(blank(self.model.device))
            self.texts(["a"])

    def images(self, images: Tensor) -> Tensor:
        """Unit features ``[B, D]`` float32 of images ``[B, 3, H, W]`` in [0, 1]."""
        return batched(self._image_features, images)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit features ``[B, D]`` float32; what does not fit the text tower is cut off."""
        tokens = self._tokenizer(
            list(prompts),
            padding=self._padding,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        # CLIP's text tower is causal and SigLIP's reads the padding: neither needs the mask.
        features = self.model.get_text_features(input_ids=tokens["input_ids"]).pooler_output
        return F.normalize(features.float(), dim=-1)

    def _image_features(self, images: Tensor) -> Tensor:
        inputs = self._preprocess(images)
        inputs = inputs if isinstance(inputs, dict) else {"pixel_values": inputs}
        features = self.model.get_image_features(**inputs).pooler_output
        return F.normalize(features.float(), dim=-1)


def text_limit(path: str, tokenizer: str) -> TextLimit | None:
    """Of the text tower of a CLIP or SigLIP checkpoint; None: it is not on this machine."""
    from transformers import AutoConfig

    if not is_there(path):
        return None
    try:
        config = AutoConfig.from_pretrained(resolve_checkpoint(path), local_files_only=True)
        most: int = config.text_config.max_position_embeddings
    except Exception:  # the loader says what is wrong with it
        return None
    return tokenizer_limit(tokenizer, most=most)


def load_clip(path: str, device: torch.device, processor: str | None = None) -> DualEncoder:
    """A CLIPModel checkpoint.

    Args:
        path: its folder or hub id.
        device: where to compute.
        processor: folder or hub id of tokenizer and preprocessing, if not ``path``.

    Raises:
        ConfigError: if one of them is missing or of another kind.
    """
    from transformers import CLIPModel

    model = load_model(CLIPModel, path, device)
    source, field = (path, "path") if processor is None else (processor, "processor")
    tokenizer = load_tokenizer(source, field)
    preprocess = Preprocessing.from_pretrained(source, field)
    return DualEncoder(model, tokenizer, preprocess, "longest", f"{field}: {source!r}")


def load_siglip(path: str, device: torch.device) -> DualEncoder:
    """A SiglipModel or Siglip2Model (NaFlex) checkpoint.

    SigLIP 2 was trained on lower-case text, which its fixed-resolution checkpoints do not say:
    their tokenizer is Gemma's as it is (huggingface/transformers#43101).

    Raises:
        ConfigError: if it is missing or of another kind.
    """
    from tokenizers import normalizers
    from transformers import GemmaTokenizer, Siglip2Model, SiglipModel

    config = read_processor_config(path)
    if "max_num_patches" in config:
        model, preprocess = Siglip2Model, partial(naflex_patches, config=config)
    else:
        model, preprocess = SiglipModel, Preprocessing.from_pretrained(path)
    model, tokenizer = load_model(model, path, device), load_tokenizer(path)
    if isinstance(tokenizer, GemmaTokenizer):
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), backend.normalizer])
    return DualEncoder(model, tokenizer, preprocess, "max_length", f"path: {path!r}")


class PromptReward:
    """``scale * cosine + bias`` of image and prompt."""

    def __init__(self, encoder: DualEncoder, scale: float = 1.0, bias: float = 0.0) -> None:
        self._encoder, self._scale, self._bias = encoder, scale, bias

    @torch.no_grad()
    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """See the Protocol."""
        unique, place = distinct(examples)
        texts = self._encoder.texts([example.prompt for example in unique])
        cosine = (self.embed(images) * texts[place.to(images.device)]).sum(1)
        return self._scale * cosine + self._bias

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """See ImageEmbedder."""
        return self._encoder.images(images)


def batched(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """``function`` applied to a few rows at a time."""
    return torch.cat([function(rows) for rows in inputs.split(_MAX_BATCH)])
