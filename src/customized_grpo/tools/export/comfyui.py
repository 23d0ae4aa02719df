"""A LoRA in the layout that ComfyUI reads for the FLUX family.

ComfyUI knows diffusers' names of the modules (``comfy/lora.py``, ``model_lora_keys_unet``: of a
Flux model, ``transformer.NAME`` for all that ``comfy/utils.py``, ``flux_to_diffusers``, maps to
a part of its own fused weights) and of the two matrices (``comfy/weight_adapter/lora.py``). What
differs is the scale: it reads none of diffusers' metadata but a tensor ``NAME.alpha`` beside each
pair, and adds ``alpha / rank B A``; without one, ``B A``.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from customized_grpo.assets import one_line
from customized_grpo.errors import CheckpointError, ConfigError
from customized_grpo.generators.lora_files import LORA_METADATA, alpha_of, lora_config

FAMILIES = ("flux-kontext", "flux2-klein", "uno")

_DOUBLE = (
    r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|norm1(_context)?\.linear|"
    r"ff(_context)?\.(net\.0\.proj|net\.2|linear_in|linear_out)"
)
_SINGLE = r"attn\.(to_[qkv]|to_qkv_mlp_proj|to_out)|norm\.linear|proj_mlp|proj_out"
_KNOWN = re.compile(
    rf"transformer\.(transformer_blocks\.\d+\.({_DOUBLE})|"
    rf"single_transformer_blocks\.\d+\.({_SINGLE})|x_embedder|context_embedder|proj_out)"
)
_MATRIX = re.compile(r"\.lora_[AB]\.weight$")


def comfyui_tensors(lora: Path) -> dict[str, Tensor]:
    """The tensors of a LoRA file in diffusers format, with an alpha beside each pair.

    Raises:
        CheckpointError: if the file cannot be read or has no scale.
        ConfigError: if it adapts a module that ComfyUI has no name for.
    """
    from safetensors import safe_open

    with one_line(f"{lora}: cannot be read as a LoRA", CheckpointError), safe_open(lora, "pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        if (config := lora_config(f.metadata())) is None:
            raise ValueError(f"{LORA_METADATA} is missing, without which alpha is not known")
    for module in sorted({_MATRIX.sub("", name) for name in tensors}):
        if not _KNOWN.fullmatch(module):
            raise ConfigError(
                f"lora.target_modules: must name what ComfyUI knows of the FLUX family for --to "
                f"comfyui, got {module!r}; export --to hub-folder or merged"
            )
        name, rank = module.removeprefix("transformer."), len(tensors[f"{module}.lora_A.weight"])
        tensors[f"{module}.alpha"] = torch.tensor(alpha_of(name, rank, config))
    return tensors
