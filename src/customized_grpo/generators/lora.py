"""LoRA on a diffusers transformer: attach, switch off, write in the format that loads anywhere."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from customized_grpo.config import LoraSettings
from customized_grpo.errors import ConfigError
from customized_grpo.generators.cpu import unmerged
from customized_grpo.generators.lora_files import Pair, read_lora

TRAINED = "default"  # peft's name of an adapter that was given none
_START = "start"
DEFAULT_RANK = 32


def attach_lora(transformer: nn.Module, settings: LoraSettings, targets: Sequence[str]) -> None:
    """Freezes the transformer and adds float32 adapters: those of the file that the settings name,
    or new ones, which start as the identity.

    Raises:
        ConfigError: if a target names no module.
        CheckpointError: if the file does not fit.
    """
    from peft import LoraConfig

    transformer.requires_grad_(False)
    if settings.path is not None:
        add_lora(transformer, read_lora(Path(settings.path), transformer, "lora.path: "))
        return
    rank, alpha = settings.rank or DEFAULT_RANK, settings.alpha
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


def add_lora(transformer: Any, pairs: Mapping[str, Pair], name: str = TRAINED) -> None:
    """Adds float32 adapters with these weights, each of its own rank and alpha, and selects them.

    Not by peft's loader alone: on a bfloat16 base that rounds the adapters too.
    """
    ranks = {module: pair.rank for module, pair in pairs.items()}
    alphas = {module: pair.alpha for module, pair in pairs.items()}
    (rank, _), (alpha, _) = (Counter(x.values()).most_common(1)[0] for x in (ranks, alphas))
    parts = {f"{module}.lora_A.weight": pair.down for module, pair in pairs.items()}
    parts |= {f"{module}.lora_B.weight": pair.up for module, pair in pairs.items()}
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{module}": r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{module}": a for module, a in alphas.items() if a != alpha},
        "target_modules": "|".join(map(re.escape, pairs)),  # names alone would match ends of names
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # as keep_start means it
        transformer.load_lora_adapter(
            parts, prefix=None, adapter_name=name, metadata=config, low_cpu_mem_usage=True
        )
    for module, pair in pairs.items():
        layer = transformer.get_submodule(module)
        for part, tensor in ((layer.lora_A, pair.down), (layer.lora_B, pair.up)):
            weight = part[name].weight
            weight.data = tensor.to(weight.device, torch.float32, copy=True)
    transformer.set_adapter(name)


def load_lora(transformer: nn.Module, path: Path) -> None:
    """The adapters of a file, or of the one in a folder, in place of those before.

    Raises:
        CheckpointError: see ``read_lora``.
    """
    detach_lora(transformer)
    add_lora(transformer, read_lora(path, transformer))


def keep_start(transformer: nn.Module) -> None:
    """Keeps the adapters as they are now, frozen beside those that are trained."""
    from peft.tuners.lora import LoraLayer

    def values(layers: Any) -> Tensor:
        return layers[TRAINED].weight.detach()  # a parameter would be shared, not copied

    pairs = {
        name: Pair(
            down=values(module.lora_A),
            up=values(module.lora_B),
            alpha=module.lora_alpha[TRAINED],
        )
        for name, module in transformer.named_modules()
        if isinstance(module, LoraLayer)
    }
    add_lora(transformer, pairs, _START)
    transformer.set_adapter(TRAINED)  # pyright: ignore


@contextmanager
def start_policy(transformer: nn.Module) -> Iterator[None]:
    """The model with the adapters that ``keep_start`` kept, inside the context."""
    with unmerged(transformer):
        transformer.set_adapter(_START)  # pyright: ignore
        try:
            yield
        finally:
            transformer.set_adapter(TRAINED)  # pyright: ignore


def trust_autocast(transformer: nn.Module) -> None:
    """Saves the casts that autocast would only repeat or undo; for use under bfloat16 autocast.

    peft casts the adapters' inputs to their float32, token by token, and autocast casts them back.
    Frozen weights are cast again at every use: those no adapter adds to are cast here, once.
    Quantised layers answer in the type they are asked in, not in autocast's, and norms ask in
    float32 on CUDA: they are asked in bfloat16, as the others, or all that follows would be wider.
    """
    from peft.tuners.lora import LoraLayer

    adapted = {id(m.base_layer) for m in transformer.modules() if isinstance(m, LoraLayer)}
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
        elif _is_quantized(module):
            if _in_bfloat16 not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_in_bfloat16)
        elif type(module) is nn.Linear and id(module) not in adapted:
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()


def _is_quantized(module: nn.Module) -> bool:
    """Bitsandbytes has layers of its own, torchao tensors."""
    is_linear = isinstance(module, nn.Linear)
    return is_linear and not (type(module) is nn.Linear and type(module.weight.data) is Tensor)


def _in_bfloat16(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.bfloat16() for tensor in inputs)


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
