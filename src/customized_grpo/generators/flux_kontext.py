"""FLUX.1 Kontext (Black Forest Labs, arXiv:2506.15742) through the stock FluxKontextPipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from customized_grpo.config.text_limits import TextLimit, tokenizer_limit
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.generators.pipeline import PipelineConfig, Size, load_pipeline, loading


@dataclass(frozen=True, kw_only=True, slots=True)
class FluxKontextConfig(PipelineConfig):
    """A FLUX.1 Kontext checkpoint in diffusers format; its VAE may be the small TAEF1.

    Hub id: 'black-forest-labs/FLUX.1-Kontext-dev', guidance_scale 2.5.
    """

    type: Literal["flux-kontext"] = "flux-kontext"

    def text_limit(self) -> TextLimit | None:
        """See Plug: of the T5, whose tokens the transformer sees."""
        return tokenizer_limit(self.path, "tokenizer_2", self.max_sequence_length, around=1)

    def build(self, device: torch.device) -> Flux1Generator:
        """Loads the pipeline onto the device."""
        from diffusers import FluxKontextPipeline

        with loading(self):
            return Flux1Generator(load_pipeline(self, FluxKontextPipeline), self, device, Kontext())


class Kontext:
    """One reference, at the target's positions on a plane of its own."""

    max_references = 1

    def offset(self, number: int, target: Size, before: Sequence[Size]) -> tuple[int, int, int]:
        """See ReferenceScheme."""
        return 1, 0, 0

    def sequence_length(self, target: Size) -> int:
        """See ReferenceScheme: the target's tokens."""
        return target[0] * target[1]
