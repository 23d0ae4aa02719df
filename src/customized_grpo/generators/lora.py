"""LoRA on a diffusers transformer: attach, switch off, write in the format that loads anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from customized_grpo.assets import check_finite, one_line
from customized_grpo.config import LoraSettings
from customized_grpo.errors import CheckpointError, ConfigError
from customized_grpo.files import LORA_FILE
from customized_grpo.generators.cpu import unmerged

LORA_METADATA = "lora_adapter_metadata"  # where diffusers keeps rank and alpha


def attach_lora(transformer: nn.Module, settings: LoraSettings, targets: Sequence[str]) -> None:
    """Freezes the transformer and adds float32 adapters that start as the identity."""
    from peft import LoraConfig

    transformer.requires_grad_(False)
    rank, alpha = settings.rank, settings.alpha
    given = settings.target_modules
    names = {target: _names(transformer, target) for target in given or targets}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # pyright: ignore[reportArgumentType]
        init_lora_weights="gaussian",
        target_modules=[name for some in names.values() for name in some],
    )
    try:
        if given and not all(names.values()):
            raise ValueError("peft would leave out what names nothing")
        transformer.add_adapter(config)  # pyright: ignore
    except ValueError as error:
        known = sorted({name.split(".")[-1] for name, _ in transformer.named_modules()} - {""})
        wrong = [name for name, some in names.items() if not some] or list(names)
        raise ConfigError(
            f"lora.target_modules: must name modules of the transformer, got {wrong}; there are "
            f"{', '.join(known)}"
        ) from error
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _names(transformer: nn.Module, target: str) -> list[str]:
    """A target as peft takes it: the end of names, or whole names in place of one with ``*``."""
    pattern = re.escape(target).replace(r"\*", r"[^.]+")
    known = [name for name, _ in transformer.named_modules()]
    if "*" in target:
        return [name for name in known if re.fullmatch(pattern, name)]
    return [target] if any(f".{name}".endswith(f".{target}") for name in known) else []


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
            if LORA_METADATA not in (opened.metadata() or {}):
                raise ValueError(f"{LORA_METADATA} is missing, without which alpha is not known")
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
    """Saves the casts that autocast would only repeat or undo; for use under bfloat16 autocast.

    peft casts the adapters' inputs to their float32, token by token, and autocast casts them back.
    Frozen weights are cast again at every use: those no adapter adds to are cast here, once.
    """
    from peft.tuners.lora import LoraLayer

    adapted = {id(m.base_layer) for m in transformer.modules() if isinstance(m, LoraLayer)}
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
        elif type(module) is nn.Linear and id(module) not in adapted:
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()


def set_strength(transformer: nn.Module, strength: float) -> None:
    """How much of every adapter is added: 0 = the base, 1 = as it was trained."""
    from peft.tuners.lora import LoraLayer

    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            for name in module.active_adapters:
                module.set_scale(name, strength)


def detach_lora(transformer: nn.Module) -> None:
    """The transformer as it was before ``load_lora``, ready for another one."""
    if getattr(transformer, "peft_config", None):
        transformer.unload_lora()  # pyright: ignore


@contextmanager
def adapters_disabled(transformer: nn.Module) -> Iterator[None]:
    """Bitwise the base model inside the context."""
    if not getattr(transformer, "peft_config", None):
        yield
        return
    with unmerged(transformer):  # peft would subtract what it thinks it has added
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
