"""LoRAs in the layouts of other trainers, and what each adds to the weights of diffusers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

# Module of the original code -> parts of diffusers, whose rows follow each other in it.
_ATTENTION = {
    "double_blocks.N.img_attn.qkv": [f"transformer_blocks.N.attn.to_{part}" for part in "qkv"],
    "double_blocks.N.txt_attn.qkv": [
        f"transformer_blocks.N.attn.add_{part}_proj" for part in "qkv"
    ],
    "double_blocks.N.img_attn.proj": ["transformer_blocks.N.attn.to_out.0"],
    "double_blocks.N.txt_attn.proj": ["transformer_blocks.N.attn.to_add_out"],
}
_FLUX1 = _ATTENTION | {
    "double_blocks.N.img_mlp.0": ["transformer_blocks.N.ff.net.0.proj"],
    "double_blocks.N.txt_mlp.2": ["transformer_blocks.N.ff_context.net.2"],
    "single_blocks.N.linear2": ["single_transformer_blocks.N.proj_out"],
    # single_blocks.N.linear1 diffusers splits at the widths of FLUX.1 [dev] alone
}
_FLUX2 = _ATTENTION | {
    "double_blocks.N.img_mlp.0": ["transformer_blocks.N.ff.linear_in"],
    "double_blocks.N.txt_mlp.2": ["transformer_blocks.N.ff_context.linear_out"],
    "single_blocks.N.linear1": ["single_transformer_blocks.N.attn.to_qkv_mlp_proj"],
    "single_blocks.N.linear2": ["single_transformer_blocks.N.attn.to_out"],
}
_QWEN = {
    name: [name]
    for names in [*_ATTENTION.values(), ["transformer_blocks.N.img_mlp.net.0.proj"]]
    for name in names
}
_TABLES = {"flux-kontext": _FLUX1, "flux2-klein": _FLUX2, "qwen-image-edit-plus": _QWEN}
_XLABS = {"img_attn.qkv": "qkv_lora1", "txt_attn.qkv": "qkv_lora2", "img_attn.proj": "proj_lora1"}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Of one module: the weights change by ``alpha / rank up down``."""

    down: Tensor
    up: Tensor
    alpha: float
    parts: list[str]

    @property
    def rank(self) -> int:
        return len(self.down)


Adapters = Mapping[str, Adapter]


def make_adapters(
    family: str, transformer: Any, *, fused: bool, scaled: bool = True, modules: str = ""
) -> Adapters:
    """Random ones of many ranks and, if ``scaled``, alphas that are not the rank, by module."""
    table = _TABLES[family]
    if not fused:
        table = {part: [part] for parts in table.values() for part in parts}
    random, found = torch.Generator().manual_seed(0), {}
    counts = itertools.cycle([(4, 6.0), (2, 1.0), (4, 3.0), (3, 4.5)])
    for block, (name, parts) in itertools.product("01", table.items()):
        if not re.search(modules, name):
            continue
        parts = [part.replace("N", block) for part in parts]
        rank, alpha = next(counts)
        layers = [transformer.get_submodule(part) for part in parts]
        found[name.replace("N", block)] = Adapter(
            down=0.1 * torch.randn(rank, layers[0].in_features, generator=random),
            up=0.1 * torch.randn(sum(x.out_features for x in layers), rank, generator=random),
            alpha=alpha if scaled else rank,
            parts=parts,
        )
    return found


@torch.no_grad()
def merge(transformer: Any, adapters: Adapters) -> None:
    """Adds them to the weights, one by one."""
    for adapter in adapters.values():
        change = adapter.alpha / adapter.rank * (adapter.up.double() @ adapter.down.double())
        layers = [transformer.get_submodule(part) for part in adapter.parts]
        rows = change.split([layer.out_features for layer in layers])
        for layer, some in zip(layers, rows, strict=True):
            layer.weight += some.float()


def _config(adapters: Adapters, rslora: bool = False) -> LoraConfig:
    alphas = {n: a.alpha / (a.rank**0.5 if rslora else 1) for n, a in adapters.items()}
    return LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={name: adapter.rank for name, adapter in adapters.items()},
        alpha_pattern=alphas,  # pyright: ignore[reportArgumentType]
        target_modules=list(adapters),
        use_rslora=rslora,
    )


def _fill(module: Any, adapters: Adapters) -> None:
    for name, adapter in adapters.items():
        layer = module.get_submodule(name)
        layer.lora_A["default"].weight.data = adapter.down
        layer.lora_B["default"].weight.data = adapter.up


def write_diffusers(adapters: Adapters, folder: Path, pipeline: Any) -> Path:
    """By diffusers' own training scripts' calls."""
    pipeline.transformer.add_adapter(_config(adapters))
    _fill(pipeline.transformer, adapters)
    pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer),
        **_collate_lora_metadata({"transformer": pipeline.transformer}),
    )
    return folder


def write_peft(adapters: Adapters, folder: Path, pipeline: Any, rslora: bool = False) -> Path:
    """By peft itself."""
    model = get_peft_model(pipeline.transformer, _config(adapters, rslora))
    _fill(model.base_model.model, adapters)
    model.save_pretrained(str(folder))
    return folder


def write_peft_rslora(adapters: Adapters, folder: Path, pipeline: Any) -> Path:
    return write_peft(adapters, folder, pipeline, rslora=True)


def _tensors(name: str, adapter: Adapter, down: str, up: str, alpha: bool) -> dict[str, Tensor]:
    found = {f"{name}.{down}.weight": adapter.down, f"{name}.{up}.weight": adapter.up}
    return found | ({f"{name}.alpha": torch.tensor(adapter.alpha)} if alpha else {})


def _write(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "my-lora.safetensors")
    return folder / "my-lora.safetensors"


def _by_name(
    prefix: str, separator: str, down: str, up: str, alpha: bool
) -> Callable[[Adapters, Path, Any], Path]:
    def write(adapters: Adapters, folder: Path, pipeline: Any) -> Path:
        tensors = {}
        for name, adapter in adapters.items():
            given = prefix + name.replace(".", separator)
            tensors |= _tensors(given, adapter, down, up, alpha)
        return _write(folder, tensors)

    return write


def write_xlabs(adapters: Adapters, folder: Path, pipeline: Any) -> Path:
    tensors = {}
    for name, adapter in adapters.items():
        block, part = name.split(".")[1], ".".join(name.split(".")[2:])
        given = f"double_blocks.{block}.processor.{_XLABS[part]}"
        tensors |= _tensors(given, adapter, "down", "up", alpha=False)
    return _write(folder, tensors)


@dataclass(frozen=True, kw_only=True)
class Layout:
    name: str
    write: Callable[[Adapters, Path, Any], Path]
    families: tuple[str, ...] = tuple(_TABLES)
    fused: bool = False
    """Whether FLUX has its original names."""
    scaled: bool = True
    """Whether alphas are not the ranks."""
    modules: str = ""
    """Only these; all of FLUX for xlabs are not written."""
    by_diffusers: tuple[str, ...] = tuple(_TABLES)
    """Families for which diffusers' own loader reads it, with the scale."""

    def make(self, family: str, transformer: Any) -> Adapters:
        return make_adapters(
            family, transformer, fused=self.fused, scaled=self.scaled, modules=self.modules
        )


_FLUX = ("flux-kontext", "flux2-klein")
LAYOUTS = [
    Layout(name="diffusers", write=write_diffusers),
    Layout(name="peft", write=write_peft, by_diffusers=()),
    Layout(name="peft, rslora", write=write_peft_rslora, by_diffusers=()),
    Layout(
        name="kohya", write=_by_name("lora_unet_", "_", "lora_down", "lora_up", True), fused=True
    ),
    Layout(
        name="kohya, diffusers' names",
        write=_by_name("lora_transformer_", "_", "lora_down", "lora_up", True),
        modules=r"\.attn\.",
        by_diffusers=("flux-kontext",),
    ),
    Layout(
        name="ai-toolkit",
        write=_by_name("transformer.", ".", "lora_A", "lora_B", False),
        scaled=False,
    ),
    Layout(
        name="ai-toolkit, original names",
        write=_by_name("diffusion_model.", ".", "lora_A", "lora_B", False),
        fused=True,
        scaled=False,
        by_diffusers=("flux2-klein", "qwen-image-edit-plus"),
    ),
    Layout(
        name="comfyui",
        write=_by_name("diffusion_model.", ".", "lora_down", "lora_up", True),
        fused=True,
        by_diffusers=("flux-kontext", "qwen-image-edit-plus"),
    ),
    Layout(
        name="comfyui, lora_A",
        write=_by_name("diffusion_model.", ".", "lora_A", "lora_B", True),
        fused=True,
        by_diffusers=("qwen-image-edit-plus",),
    ),
    Layout(
        name="comfyui, diffusers' names",
        write=_by_name("transformer.", ".", "lora_A", "lora_B", True),
        by_diffusers=("flux-kontext",),
    ),
    Layout(
        name="xlabs",
        write=write_xlabs,
        families=("flux-kontext",),
        fused=True,
        scaled=False,
        modules=r"(img_attn\.(qkv|proj)|txt_attn\.qkv)$",
    ),
]
