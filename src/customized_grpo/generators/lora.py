"""LoRA on a diffusers transformer: attach, switch off, write in the format that loads anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from customized_grpo.assets import check_finite, one_line
from customized_grpo.config import LoraSettings
from customized_grpo.errors import CheckpointError, ConfigError
from customized_grpo.files import LORA_FILE

LORA_METADATA = "lora_adapter_metadata"  # where diffusers keeps rank and alpha


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


_merged: WeakKeyDictionary[nn.Module, list[_Merged]] = WeakKeyDictionary()


@contextmanager
def lora_merged(transformer: nn.Module) -> Iterator[None]:
    """Adapters as part of the weights they adapt: ``x (W + s B A)`` for ``x W + s (x A) B``.

    Where gradients are enabled, the sum collects its gradient inside, over any number of backward
    passes, and hands it on to A and B at the end: by the chain rule what they would have had. Left
    as they are: layers that this makes slower, and all where the sum would lose the adapter
    (weights in bfloat16, quantised) or meet a compiled block, which knows its parameters by name.
    """
    compiled = any(m._compiled_call_impl is not None for m in transformer.modules())
    layers = [] if compiled else [m for m in transformer.modules() if _is_merged_faster(m)]
    merged: list[_Merged] = []
    _merged[transformer] = merged
    try:
        for layer in layers:
            merged.append(_Merged(layer))
        yield
    finally:
        del _merged[transformer]
        for layer in merged:
            layer.restore()
    for layer in merged:
        layer.pass_gradient_on()


_PASSES = 350  # what an adapter's passes over its output cost, in multiplications per element


def _is_merged_faster(module: Any) -> bool:
    from peft.tuners.lora import Linear

    if type(module) is not Linear or module.merged or module.disable_adapters:
        return False
    base, (name, *others) = module.base_layer, module.active_adapters
    if type(base) is not nn.Linear or others or base.weight.dtype.itemsize < 4:
        return False
    if isinstance(base.weight, DTensor):  # sharded
        return False
    if not torch.is_grad_enabled():
        return True
    share = 1 + base.in_features / base.out_features
    return base.in_features <= 3 * module.r[name] * share + _PASSES  # the sum's own gradient


class _Merged:
    """One layer whose base holds the sum."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._weight = layer, layer.base_layer.weight
        (name,) = layer.active_adapters
        change = layer.lora_B[name].weight @ layer.lora_A[name].weight
        self._graph: Tensor = self._weight + change * layer.scaling[name]
        self._sum = nn.Parameter(self._graph.detach(), requires_grad=self._graph.requires_grad)
        self.merge()

    def merge(self) -> None:
        self._layer.base_layer.weight = self._sum
        self._layer.merged_adapters[:] = self._layer.active_adapters

    def restore(self) -> None:
        self._layer.base_layer.weight = self._weight
        self._layer.merged_adapters.clear()

    def pass_gradient_on(self) -> None:
        if self._sum.grad is not None:
            self._graph.backward(self._sum.grad)


@contextmanager
def adapters_disabled(transformer: nn.Module) -> Iterator[None]:
    """Bitwise the base model inside the context."""
    if not getattr(transformer, "peft_config", None):
        yield
        return
    merged = _merged.get(transformer, [])
    for layer in merged:
        layer.restore()  # peft would subtract what it thinks it has added
    transformer.disable_adapters()  # pyright: ignore
    try:
        yield
    finally:
        transformer.enable_adapters()  # pyright: ignore
        for layer in merged:
            layer.merge()


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
