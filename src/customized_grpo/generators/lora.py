"""LoRA on a diffusers transformer: attach, switch off, write in the format that loads anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from customized_grpo.config import LoraSettings
from customized_grpo.errors import ConfigError

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


@contextmanager
def folded_lora(transformer: nn.Module) -> Iterator[None]:
    """Inside, every adapted layer multiplies by one matrix ``W + s B A``, s = alpha / r.

    The same function, and on leaving the adapters have the same gradients: those of the matrix, G,
    are added to them as ``dA = s B^T G`` and ``dB = s G A^T``. Costs a copy of the adapted weights
    and of their gradients; saves the adapters' own products and casts, token by token. The base
    policy is not to be had inside: its weights are put aside.
    """
    from peft.tuners.lora import Linear

    layers: list[Any] = [m for m in transformer.modules() if isinstance(m, Linear)]
    aside = [layer.base_layer.weight for layer in layers]
    with torch.no_grad():
        for layer, weight in zip(layers, aside, strict=True):
            folded = weight + layer.get_delta_weight(layer.active_adapters[0]).to(weight.dtype)
            layer.base_layer.weight = nn.Parameter(folded)
    try:
        with adapters_disabled(transformer):
            yield
        for layer in layers:
            _pass_gradient_on(layer)
    finally:
        for layer, weight in zip(layers, aside, strict=True):
            layer.base_layer.weight = weight


@torch.no_grad()
def _pass_gradient_on(layer: Any) -> None:
    """Adds the gradient of the folded matrix to those of the layer's adapters."""
    gradient = layer.base_layer.weight.grad
    if gradient is None:
        return
    name = layer.active_adapters[0]
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    scaled = layer.scaling[name] * gradient.to(down.dtype)
    for parameter, grad in ((down, up.T @ scaled), (up, scaled @ down.T)):
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad


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
