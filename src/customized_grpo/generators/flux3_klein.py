"""FLUX 3 Image Klein Base (Black Forest Labs) through the blocks of the stock Flux3ModularPipeline.

The stock pipeline has a model that rewrites prompts first: here they are encoded as they are given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from customized_grpo.assets import is_there, resolve_checkpoint
from customized_grpo.config.text_limits import TextLimit, tokenizer_limit
from customized_grpo.errors import ConfigError
from customized_grpo.generators.base import Conditioning
from customized_grpo.generators.flux2 import Flux2LatentsGenerator
from customized_grpo.generators.modular import load_modular
from customized_grpo.generators.pipeline import PipelineConfig, Size, loading
from customized_grpo.generators.qwen import chat_tokenizer
from customized_grpo.generators.rows import Known, in_passes
from customized_grpo.types import Example

_NATIVE_SIZE = 1024
_TEXT_TOKENS = 8192  # max_sequence_length of the stock text encoder step
_CONVERSATION = 8  # tokens of Qwen3-VL's chat template around a prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Flux3KleinConfig(PipelineConfig):
    """A FLUX 3 Image Klein Base checkpoint; guidance_scale e.g. 4, its makers' choice.

    Hub id: 'black-forest-labs/flux-3-image-klein-base'. The distilled model is refused.
    """

    is_guided_by_text: ClassVar[bool] = True

    type: Literal["flux3-klein"] = "flux3-klein"
    text_layers: tuple[int, ...] = (4, 8, 12, 16, 20, 24, 28, 32)
    """Hidden states of the text encoder that become the embedding."""

    def check(self) -> None:
        """See Plug."""
        PipelineConfig.check(self)
        if is_there(self.path):
            self.refuse_distilled()

    def refuse_distilled(self) -> None:
        """Raises a ConfigError if the checkpoint's transformer has to know where a step ends."""
        from diffusers import Flux3Transformer2DModel

        with loading(self):
            settings: Any = Flux3Transformer2DModel.load_config(  # a tuple with other arguments
                resolve_checkpoint(self.path), subfolder="transformer"
            )
            if settings.get("flow_map"):
                raise ConfigError(
                    f"path: must be a base model, got the distilled {self.path!r}: its velocity "
                    "is that of a whole step, not of a noise level as RL needs it; give "
                    "black-forest-labs/flux-3-image-klein-base"
                )

    def text_limit(self) -> TextLimit | None:
        """See Plug: a conversation of the prompt alone."""
        most = self.max_sequence_length or _TEXT_TOKENS
        return tokenizer_limit(self.path, "tokenizer", most, around=_CONVERSATION)

    def build(self, device: torch.device) -> Flux3KleinGenerator:
        """Loads the pipeline onto the device."""
        from diffusers import Flux3AutoBlocks

        self.refuse_distilled()
        blocks: Any = Flux3AutoBlocks()
        blocks.sub_blocks.pop("prompt_upsampler")
        with loading(self):
            return Flux3KleinGenerator(load_modular(self, blocks), self, device)


class Flux3KleinGenerator(Flux2LatentsGenerator):
    """Adapter: guided by the empty prompt, two passes of the transformer a step.

    A text is padded to a multiple of 80 tokens, which the transformer reads: those of another
    number have a pass of their own.
    """

    max_references = 10

    def __init__(self, pipeline: Any, config: Flux3KleinConfig, device: torch.device) -> None:
        super().__init__(pipeline, config, device, _NATIVE_SIZE)
        spec = pipeline.get_component_spec("tokenizer")
        tokenizer = chat_tokenizer(spec.pretrained_model_name_or_path, spec.subfolder)
        # In place of the stock processor, which needs torchvision and reads text alone here.
        self._texts = SimpleNamespace(
            tokenizer=tokenizer, apply_chat_template=tokenizer.apply_chat_template
        )
        self._text_layers = config.text_layers
        self._max_sequence_length = config.max_sequence_length or _TEXT_TOKENS
        self._known = Known()
        with torch.no_grad(), self._at_work(*self.text_encoders):
            self._empty_prompt = self._embed("")  # evaluation may be guided where training is not

    def _check_guidance(self, scale: float | None) -> float | None:
        if scale is None:
            raise ConfigError(
                "guidance_scale: a base model needs one, e.g. 4; 1 is without guidance"
            )
        return super()._check_guidance(scale)

    def _encode_text(self, example: Example) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        embeds = self._embed(example.prompt)
        length = torch.tensor([embeds.shape[1]], device=self.device)
        return {"encoder_hidden_states": embeds, "text_length": length}, {}

    def _embed(self, prompt: str) -> Tensor:
        from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep

        step: Any = Flux3TextEncoderStep()
        return step._get_qwen3_vl_prompt_embeds(
            text_encoder=self.pipeline.text_encoder,
            tokenizer=self._texts,
            prompt=prompt,
            device=self.device,
            max_sequence_length=self._max_sequence_length,
            pad_multiple=step.pad_multiple,
            hidden_states_layers=self._text_layers,
        )

    def _positions(self, sizes: Sequence[Size]) -> dict[str, Tensor]:
        from diffusers.modular_pipelines.flux3 import before_denoise

        scale = before_denoise.Flux3PrepareLatentsStep().image_rope_scale
        grids = [(height // self.patch, width // self.patch) for height, width in sizes]
        ids = [
            before_denoise._prepare_image_ids(*grid, scale, l_coord=-number)
            for number, grid in enumerate([self.grid, *grids])
        ]
        return {"img_ids": torch.cat(ids).to(self.device)}

    def _mu(self, num_steps: int) -> float:
        return 0.0  # not asked for: the shift is a constant

    def _predict(self, hidden: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        given, ids = conditioning.per_sample, conditioning.shared["img_ids"]
        lengths = self._known.on_host(given, "text_length")

        def run(rows: list[int]) -> Tensor:
            index = torch.tensor(rows, device=hidden.device)
            embeds = given["encoder_hidden_states"][index, : lengths[rows[0]]]
            return self._run(hidden[index], sigma[index], embeds, ids)

        positive = in_passes(self.transformer, lengths, run)
        if self._guidance is None:
            return positive
        empty = self._empty_prompt.to(given["encoder_hidden_states"].dtype)
        unguided = self._run(hidden, sigma, empty.expand(len(hidden), -1, -1), ids)
        return unguided + self._guidance * (positive - unguided)

    def _run(self, hidden: Tensor, sigma: Tensor, embeds: Tensor, ids: Tensor) -> Tensor:
        """Velocities ``[b, S, 4 C]`` of samples with texts of one length."""
        from diffusers.modular_pipelines.flux3.before_denoise import Flux3TextRoPEInputsStep

        count = math.prod(self.grid)
        return self.transformer(
            hidden_states=hidden[:, :count],
            image_cond_hidden_states=hidden[:, count:],
            timestep=sigma,
            encoder_hidden_states=embeds,
            img_ids=ids[:count],
            image_cond_ids=ids[count:],
            txt_ids=Flux3TextRoPEInputsStep._prepare_text_ids(embeds).to(hidden.device),
            return_dict=False,
        )[0]
