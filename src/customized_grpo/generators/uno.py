"""UNO (ByteDance, arXiv:2504.02160): FLUX.1 [dev] that sees 1 to 4 references by a LoRA."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from customized_grpo.assets import check_finite, one_line
from customized_grpo.buckets import long_side_for
from customized_grpo.config import Checkpoint, find_checkpoints
from customized_grpo.config.limits import Side
from customized_grpo.config.text_limits import TextLimit, tokenizer_limit
from customized_grpo.errors import ConfigError
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.generators.pipeline import PipelineConfig, Size, load_pipeline, loading


@dataclass(frozen=True, kw_only=True, slots=True)
class UnoConfig(PipelineConfig):
    """FLUX.1 [dev] with UNO's LoRA merged into it: what is trained starts from there.

    Hub ids: path 'black-forest-labs/FLUX.1-dev', uno_lora 'bytedance-research/UNO';
    guidance_scale 4, in the paper's training 3.5.
    """

    type: Literal["uno"] = "uno"
    uno_lora: str | None = None
    """UNO's LoRA: a safetensors file, its folder, or a hub id; None: it is merged already."""
    reference_long_side: Side | None = None
    """Pixels; None: 512 for one reference and 320 for several, as UNO was trained."""

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """See Plug."""
        return find_checkpoints(self, {"path": "pipeline", "uno_lora": "lora"})

    def check(self) -> None:
        """See Plug."""
        if self.uno_lora is not None and self.quantization is not None:
            raise ConfigError(
                f"quantization: must be null where uno_lora is merged, got {self.quantization!r}; "
                "merge it once, save the pipeline and give its folder as path"
            )
        PipelineConfig.check(self)

    def reference_size(self, image: Size, target: Size, count: int, multiple: int) -> Size:
        """See PipelineConfig: a long side of 512, or 320 where there are several."""
        long_side = self.reference_long_side or (512 if count == 1 else 320)
        return long_side_for(*image, long_side, multiple)

    def text_limit(self) -> TextLimit | None:
        """See Plug: of the T5, whose tokens the transformer sees."""
        return tokenizer_limit(self.path, "tokenizer_2", self.max_sequence_length, around=1)

    def build(self, device: torch.device) -> Flux1Generator:
        """Loads the pipeline and merges UNO's LoRA."""
        from diffusers import FluxPipeline

        self.check()
        with loading(self):
            pipeline = load_pipeline(self, FluxPipeline)
            if self.uno_lora is not None:
                _merge(pipeline, self.uno_lora)
            return Flux1Generator(pipeline, self, device, Uno())


def _merge(pipeline: Any, lora: str) -> None:
    with one_line(f"uno_lora: {lora!r} cannot be loaded as a LoRA of FLUX.1"):
        place = os.path.expanduser(lora)
        if not os.path.exists(place):  # diffusers asks the hub, whatever is in the cache
            from huggingface_hub import snapshot_download

            place = snapshot_download(lora, allow_patterns="*.safetensors")
        pipeline.load_lora_weights(place, use_safetensors=True)
        pipeline.fuse_lora(components=["transformer"])
        pipeline.unload_lora_weights()
        check_finite(pipeline.transformer.state_dict(), f"uno_lora: {lora!r}, merged")


class Uno:
    """References lie on the diagonal: each starts where target and earlier references end."""

    max_references = 4

    def offset(self, number: int, target: Size, before: Sequence[Size]) -> tuple[int, int, int]:
        """See ReferenceScheme."""
        earlier = [target, *before]
        return 0, sum(height for height, _ in earlier), sum(width for _, width in earlier)

    def sequence_length(self, target: Size) -> int:
        """See ReferenceScheme: a 64th of the target's tokens, as in UNO's code."""
        return 4 * target[0] * target[1] // 256
