"""What the adapters of the Qwen-Image pipelines share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from customized_grpo.assets import one_line, resolve_checkpoint


def cut(tokenizer: Any, prompt: str, limit: int | None) -> str:
    """The first ``limit`` tokens of a prompt; None: all."""
    if limit is None:
        return prompt
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    return prompt if len(ids) <= limit else tokenizer.decode(ids[:limit])


def shift(scheduler: Any, grid: tuple[int, int]) -> float:
    """Shift of the pipelines' own schedule, in the scheduler's terms, at a target's tokens."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift

    config = scheduler.config
    return calculate_shift(
        grid[0] * grid[1],
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )


def denormalised(vae: Any, latents: Tensor) -> Tensor:
    """Latents ``[B, C, 1, h, w]`` as the VAE decodes them."""
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents * std + mean).to(vae.dtype)


def chat_tokenizer(path: str, folder: str) -> Any:
    """The tokenizer of a ``Qwen3VLProcessor`` in a checkpoint, with the processor's template."""
    from transformers import AutoTokenizer, Qwen3VLProcessor

    source = resolve_checkpoint(path)
    tokenizer = AutoTokenizer.from_pretrained(source, subfolder=folder)
    settings, _ = Qwen3VLProcessor.get_processor_dict(source, subfolder=folder)
    tokenizer.chat_template = settings.get("chat_template") or tokenizer.chat_template
    return tokenizer


def image_processor(path: str) -> Any:
    """The text encoder's image processor, without torchvision, which the stock one needs."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    with one_line(f"path: {path!r} has no readable processor"):
        return Qwen2VLImageProcessorPil.from_pretrained(
            resolve_checkpoint(path), subfolder="processor"
        )
