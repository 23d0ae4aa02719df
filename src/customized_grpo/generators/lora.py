"""LoRA on a diffusers transformer: attach, switch off, write in the format that loads anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from customized_grpo.assets import check_finite, one_line
from customized_grpo.config import LoraSettings
from customized_grpo.errors import CheckpointError, ConfigError

_METADATA = "lora_adapter_metadata"  # where diffusers keeps rank and alpha
LORA_FILE = "pytorch_lora_weights.safetensors"


def attach_lora(transformer: nn.Module, settings: LoraSettings, targets: Sequence[str]) -> None:
    """Freezes the transformer and adds float32 adapters that start as the identity."""
    from peft import LoraConfig

    transformer.requires_grad_(False)
    rank, alpha = settings.rank, settings.alpha
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # pyright: ignore[reportArgumentType]
        init_lora_weights="gaussian",
        target_modules=list(settings.target_modules or targets),
    )
    try:
        transformer.add_adapter(config)  # pyright: ignore
    except ValueError as error:
        names = sorted({name.split(".")[-1] for name, _ in transformer.named_modules()} - {""})
        raise ConfigError(
            f"lora.target_modules: must name modules of the transformer, got "
            f"{list(settings.target_modules or targets)}; there are {', '.join(names)}"
        ) from error
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_lora(pipeline: Any, folder: Path) -> None:
    """Adapters that ``save_lora`` wrote, through the stock loader, which ignores what does not fit.

    Raises:
        CheckpointError: if a weight is missing, surplus, of another shape or not finite.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open
    from safetensors.torch import load_file

    file, transformer = folder / LORA_FILE, pipeline.transformer
    with one_line(f"{file}: cannot be loaded as a LoRA", CheckpointError):
        state = load_file(file)
        check_finite(state, str(file), CheckpointError)
        with safe_open(file, "pt") as opened:
            if _METADATA not in (opened.metadata() or {}):
                raise ValueError(f"{_METADATA} is missing, without which alpha is not known")
        pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE, use_safetensors=True)
        # Loaded onto a bfloat16 base, they keep the precision they were trained in.
        for name, parameter in transformer.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
        name = list(transformer.peft_config)[-1]
        loaded = get_peft_model_state_dict(transformer, adapter_name=name)
        expected = {f"transformer.{name}": tensor.shape for name, tensor in loaded.items()}
        if expected != (found := {name: tensor.shape for name, tensor in state.items()}):
            odd = min(name for name, _ in expected.items() ^ found.items())
            raise ValueError(f"{odd} must be {expected.get(odd)}, got {found.get(odd)}")


def trust_autocast(transformer: nn.Module) -> None:
    """Leaves the adapters' inputs as they are; for use under autocast only.

    peft casts them to the adapters' float32, token by token, and autocast casts them back.
    """
    from peft.tuners.lora import LoraLayer

    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


@contextmanager
def adapters_disabled(transformer: nn.Module) -> Iterator[None]:
    """Bitwise the base model inside the context."""
    if not getattr(transformer, "peft_config", None):
        yield
        return
    transformer.disable_adapters()  # pyright: ignore
    try:
        yield
    finally:
        transformer.enable_adapters()  # pyright: ignore


@torch.no_grad()
def save_lora(pipeline_class: type, transformer: nn.Module, folder: Path) -> None:
    """diffusers format with the metadata that keeps alpha (see FIELD_NOTES)."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    pipeline_class.save_lora_weights(  # pyright: ignore
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )
