"""Every generator family: its adapter, and an oracle for its pictures that owes nothing to it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    Flux2KleinPipeline,
    Flux3AutoBlocks,
    FluxKontextPipeline,
    FluxPipeline,
    ModularPipeline,
    QwenImage21Pipeline,
)
from diffusers import QwenImageEditPlusPipeline as QwenPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as qwen_module
from PIL import Image
from tiny_pipelines import (
    ChatProcessor,
    PictureAndTextProcessor,
    TextProcessor,
    build_flux1,
    build_flux3,
    build_klein,
    build_qwen,
    build_qwen_21,
)
from torch import Tensor
from transformers import AutoTokenizer

from customized_grpo.config import RunConfig, read_config
from customized_grpo.generators.base import Conditioning, Generator
from customized_grpo.generators.flux2_klein import Flux2KleinConfig
from customized_grpo.generators.flux3_klein import Flux3KleinConfig
from customized_grpo.generators.flux_kontext import FluxKontextConfig
from customized_grpo.generators.pipeline import PipelineConfig
from customized_grpo.generators.qwen_image_21 import QwenImage21Config
from customized_grpo.generators.qwen_image_edit_plus import QwenImageEditPlusConfig
from customized_grpo.generators.uno import UnoConfig
from customized_grpo.pictures import to_pil
from customized_grpo.training.policy import Policy
from customized_grpo.types import Example

HEIGHT, WIDTH, REFERENCE, TEXT = 64, 144, 96, 48  # of one area, so that nothing is resized
_AREA = REFERENCE * REFERENCE
HEIGHT_21, WIDTH_21 = 64, 128  # multiples of 32
STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family at toy size."""

    name: str
    build: Callable[[Path], None]
    config: Callable[[str], PipelineConfig]
    load: Callable[[str], Any]
    """The pipeline that the oracle runs."""
    latents: Callable[[Any, Example, Tensor, int], Tensor]
    """(pipeline, example, packed noise, steps) -> latents as the family's decoder takes them."""
    most_references: int


def pictures(example: Example) -> list[Image.Image]:
    return [to_pil(reference) for reference in example.references]


def _kontext(pipeline: Any, example: Example, noise: Tensor, steps: int) -> Tensor:
    return pipeline(
        image=pictures(example)[0], prompt=example.prompt, height=HEIGHT, width=WIDTH,
        max_area=_AREA, _auto_resize=False, num_inference_steps=steps, guidance_scale=2.5,
        max_sequence_length=TEXT, latents=noise, output_type="latent",
    ).images  # fmt: skip


@torch.no_grad()
def _uno(pipeline: Any, example: Example, noise: Tensor, steps: int) -> Tensor:
    """UNO as its paper and code describe it (arXiv:2504.02160): reference tokens follow the
    target's, with ids that start where target and earlier references end, in both directions."""
    embeds, pooled, text_ids = pipeline.encode_prompt(
        example.prompt, max_sequence_length=TEXT, device="cpu"
    )
    vae, tokens, ids = pipeline.vae, [], [_grid(HEIGHT // 16, WIDTH // 16, 0, 0)]
    row, column = HEIGHT // 16, WIDTH // 16
    for reference in example.references:
        mode = vae.encode(reference[None] * 2 - 1).latent_dist.mode()
        scaled = (mode - vae.config.shift_factor) * vae.config.scaling_factor
        channels, high, wide = scaled.shape[1:]
        patches = scaled.reshape(1, channels, high // 2, 2, wide // 2, 2)
        tokens.append(patches.permute(0, 2, 4, 1, 3, 5).reshape(1, -1, channels * 4))
        ids.append(_grid(high // 2, wide // 2, row, column))
        row, column = row + high // 2, column + wide // 2
    mu = 0.5 + ((HEIGHT // 8) * (WIDTH // 8) // 256 - 256) * (1.15 - 0.5) / (4096 - 256)
    times = torch.linspace(1, 0, steps + 1)
    times = np.exp(mu) / (np.exp(mu) + (1 / times - 1))
    latents = noise
    for now, then in itertools.pairwise(times):
        velocity = pipeline.transformer(
            hidden_states=torch.cat([latents, *tokens], 1), timestep=now[None].float(),
            guidance=torch.tensor([4.0]), pooled_projections=pooled, encoder_hidden_states=embeds,
            txt_ids=text_ids, img_ids=torch.cat(ids), return_dict=False,
        )[0][:, : latents.shape[1]]  # fmt: skip
        latents = latents + (then - now) * velocity
    return latents


def _grid(high: int, wide: int, row: int, column: int) -> Tensor:
    ids = torch.zeros(high, wide, 3)
    ids[..., 1] += torch.arange(high)[:, None] + row
    ids[..., 2] += torch.arange(wide)[None] + column
    return ids.reshape(-1, 3)


def _klein(guidance: float) -> Callable[[Any, Example, Tensor, int], Tensor]:
    def run(pipeline: Any, example: Example, noise: Tensor, steps: int) -> Tensor:
        spatial = noise.transpose(1, 2).unflatten(2, (HEIGHT // 16, WIDTH // 16))
        return pipeline(
            image=pictures(example), prompt=example.prompt, height=HEIGHT, width=WIDTH,
            num_inference_steps=steps, guidance_scale=guidance, max_sequence_length=TEXT,
            text_encoder_out_layers=(1, 2, 3), latents=spatial, output_type="latent",
        ).images  # fmt: skip

    return run


def _flux3(pipeline: Any, example: Example, noise: Tensor, steps: int) -> Tensor:
    pipeline.guider = pipeline.guider.new(guidance_scale=4.0)
    spatial = noise.transpose(1, 2).unflatten(2, (HEIGHT // 16, WIDTH // 16))
    latents = pipeline(
        image=pictures(example), prompt=example.prompt, height=HEIGHT, width=WIDTH,
        num_inference_steps=steps, text_encoder_out_layers=(1, 2, 3), latents=spatial,
        output="latents",
    )  # fmt: skip
    return latents.flatten(2).transpose(1, 2)


def _load_flux3(path: str) -> Any:
    blocks = Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    pipeline = blocks.init_pipeline(path)
    load_flux3_parts(pipeline, path, dtype=torch.float32)
    return pipeline


def load_flux3_parts(pipeline: Any, path: str, **how: Any) -> None:
    """What load_components does, without torchvision."""
    parts = [name for name in pipeline.null_component_names if name != "tokenizer"]
    ModularPipeline.load_components(pipeline, parts, **how)  # whatever its own has become
    pipeline.tokenizer = TextProcessor(path)


def _qwen(guidance: float) -> Callable[[Any, Example, Tensor, int], Tensor]:
    def run(pipeline: Any, example: Example, noise: Tensor, steps: int) -> Tensor:
        areas = qwen_module.VAE_IMAGE_SIZE, qwen_module.CONDITION_IMAGE_SIZE
        qwen_module.VAE_IMAGE_SIZE = qwen_module.CONDITION_IMAGE_SIZE = _AREA
        try:
            return pipeline(
                image=pictures(example), prompt=example.prompt, height=HEIGHT, width=WIDTH,
                negative_prompt=" " if guidance > 1 else None, true_cfg_scale=guidance,
                num_inference_steps=steps, latents=noise, output_type="latent",
            ).images  # fmt: skip
        finally:
            qwen_module.VAE_IMAGE_SIZE, qwen_module.CONDITION_IMAGE_SIZE = areas

    return run


def _load_qwen(path: str) -> QwenPipeline:
    """The stock pipeline with the fix of diffusers #14194 and without torchvision."""
    pipeline = QwenPipeline.from_pretrained(path, processor=None, dtype=torch.float32)
    pipeline.register_modules(processor=PictureAndTextProcessor(Path(path), pipeline.tokenizer))
    encoder, plain = pipeline.text_encoder, pipeline.text_encoder.forward

    def forward(input_ids: Tensor, **rest: Any) -> Any:
        marked = (input_ids == encoder.config.image_token_id).int()
        return plain(input_ids=input_ids, mm_token_type_ids=marked, **rest)

    encoder.forward = forward
    return pipeline


def _qwen_21(guidance: float) -> Callable[[Any, Example, Tensor, int], Tensor]:
    def run(pipeline: Any, example: Example, noise: Tensor, steps: int) -> Tensor:
        return pipeline(
            image=pictures(example), prompt=example.prompt, height=HEIGHT_21, width=WIDTH_21,
            negative_prompt=" " if guidance > 1 else None, true_cfg_scale=guidance,
            num_inference_steps=steps, latents=noise, output_type="latent",
            output_resolution=REFERENCE,
        ).images  # fmt: skip

    return run


def _load_qwen_21(path: str) -> QwenImage21Pipeline:
    """The stock pipeline without torchvision."""
    tokenizer = AutoTokenizer.from_pretrained(path, subfolder="processor")
    return QwenImage21Pipeline.from_pretrained(
        path, processor=ChatProcessor(Path(path), tokenizer), dtype=torch.float32
    )


def _loader(pipeline_class: Any) -> Callable[[str], Any]:
    return lambda path: pipeline_class.from_pretrained(path, dtype=torch.float32)


def _qwen_config(path: str, **fields: Any) -> QwenImageEditPlusConfig:
    return QwenImageEditPlusConfig(
        path=path, height=HEIGHT, width=WIDTH, reference_area=_AREA,
        condition_area=_AREA, **fields,
    )  # fmt: skip


def _qwen_21_config(path: str, **fields: Any) -> QwenImage21Config:
    return QwenImage21Config(
        path=path, height=HEIGHT_21, width=WIDTH_21, reference_area=_AREA, **fields
    )


def _flux3_config(path: str) -> Flux3KleinConfig:
    return Flux3KleinConfig(
        path=path, height=HEIGHT, width=WIDTH, text_layers=(1, 2, 3), guidance_scale=4.0
    )


def _config(config_class: Any, **fields: Any) -> Callable[[str], PipelineConfig]:
    return lambda path: config_class(
        path=path, height=HEIGHT, width=WIDTH, max_sequence_length=TEXT, **fields
    )


FAMILIES = [
    Family(
        name="flux-kontext",
        build=lambda folder: build_flux1(folder, FluxKontextPipeline),
        config=_config(FluxKontextConfig, guidance_scale=2.5),
        load=_loader(FluxKontextPipeline),
        latents=_kontext,
        most_references=1,
    ),
    Family(
        name="uno",
        build=lambda folder: build_flux1(folder, FluxPipeline),
        config=_config(UnoConfig, guidance_scale=4.0, reference_long_side=REFERENCE),
        load=_loader(FluxPipeline),
        latents=_uno,
        most_references=4,
    ),
    Family(
        name="flux2-klein",
        build=lambda folder: build_klein(folder, distilled=True),
        config=_config(Flux2KleinConfig, text_layers=(1, 2, 3)),
        load=_loader(Flux2KleinPipeline),
        latents=_klein(1.0),
        most_references=4,
    ),
    Family(
        name="flux2-klein-base",
        build=lambda folder: build_klein(folder, distilled=False),
        config=_config(Flux2KleinConfig, text_layers=(1, 2, 3), guidance_scale=4.0),
        load=_loader(Flux2KleinPipeline),
        latents=_klein(4.0),
        most_references=4,
    ),
    Family(
        name="qwen-image-edit-plus",
        build=build_qwen,
        config=_qwen_config,
        load=_load_qwen,
        latents=_qwen(1.0),
        most_references=3,
    ),
    Family(
        name="qwen-image-edit-plus, guided",
        build=build_qwen,
        config=lambda path: _qwen_config(path, guidance_scale=4.0),
        load=_load_qwen,
        latents=_qwen(4.0),
        most_references=3,
    ),
    Family(
        name="qwen-image-2.1",
        build=build_qwen_21,
        config=_qwen_21_config,
        load=_load_qwen_21,
        latents=_qwen_21(1.0),
        most_references=10,
    ),
    Family(
        name="qwen-image-2.1, guided",
        build=build_qwen_21,
        config=lambda path: _qwen_21_config(path, guidance_scale=4.0),
        load=_load_qwen_21,
        latents=_qwen_21(4.0),
        most_references=10,
    ),
    Family(
        name="flux3-klein",
        build=build_flux3,
        config=_flux3_config,
        load=_load_flux3,
        latents=_flux3,
        most_references=10,
    ),
]


@torch.no_grad()
def denoise(generator: Generator, conditioning: Conditioning, noise: Tensor) -> Tensor:
    """The rollout's own transitions at noise level 0."""
    policy = Policy(
        generator=generator,
        sigmas=generator.sigmas(STEPS, None),
        dynamics="flow",
        noise_level=0.0,
        autocast=False,
    )
    latents = noise
    for step in range(STEPS):
        index = torch.full((len(noise),), step)
        latents, std = policy.transition(latents, index, conditioning)
        assert not std.any()
    return latents


def run_config(family: Family, checkpoint: str, output: Path, **train_fields: object) -> RunConfig:
    """A small run on toy_world's pictures, rewarded by redness alone."""
    config = family.config(checkpoint)
    fields = {
        name: value for name, value in dataclasses.asdict(config).items() if value is not None
    }
    raw = {
        "name": "tiny",
        "output_dir": str(output),
        "data": {"type": "toy_world:ToyData", "num_references": min(2, family.most_references)},
        "generator": {**fields, "type": f"{type(config).__module__}:{type(config).__qualname__}"},
        "rewards": [
            {"type": "toy_world:Redness", "name": name, "objective": name}
            for name in ("identity", "prompt")
        ],
        "lora": {"rank": 8},
        "rollout": {
            "num_steps": 4,
            "num_trained_steps": 3,
            "dynamics": "flow",
            "noise_level": 0.7,
            "shift": 1.0,
            "group_size": 8,
            "prompts_per_rollout": 2,
        },
        "advantage": {"shaping": "linear", "schedule": {"type": "constant", "prompt": 0.5}},
        "train": {"inner_updates": 1, "sample_every": 0, **train_fields},
    }
    return read_config(json.dumps(raw), "test")
