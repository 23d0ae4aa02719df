"""The folders that an export writes: each appears as a whole, none is overwritten."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from customized_grpo.assets import resolve_checkpoint
from customized_grpo.config import parse_yaml
from customized_grpo.errors import ConfigError
from customized_grpo.files import LORA_FILE, write_folder
from customized_grpo.generators.modular import MODULAR_INDEX, own_parts, placed
from customized_grpo.generators.pipeline import PipelineConfig
from customized_grpo.runs.files import CONFIG
from customized_grpo.runs.run import Run
from customized_grpo.runs.sinks.masking import config_without_secrets
from customized_grpo.tools.export.card import PICTURE, evaluation_of, model_card, picture_of
from customized_grpo.tools.export.comfyui import FAMILIES, comfyui_tensors
from customized_grpo.training.build import build_generator

logger = logging.getLogger("customized_grpo")

Format = Literal["hub-folder", "comfyui", "merged"]


def export_run(
    folder: Path, to: Format, out: Path, license: str = "other", picture: bool = True
) -> None:
    """Writes what a run has trained into a new folder.

    Args:
        folder: of the run.
        to: the weights with a model card; one file for ComfyUI; or the whole pipeline.
        out: the new folder.
        license: for the model card.
        picture: whether the model card shows pictures, and with them references, of the run.

    Raises:
        CheckpointError: if the folder is no run with weights.
        ConfigError: if ``out`` is there already, or the run cannot be had in this format.
    """
    if out.exists():
        raise ConfigError(f"--out must not exist yet, got {str(out)!r}; name another folder")
    run = Run.open(folder)
    writers: dict[Format, Callable[[Path], None]] = {
        "hub-folder": partial(_write_hub_folder, run, str(out), license, picture),
        "comfyui": partial(_write_comfyui, run),
        "merged": partial(_write_merged, run, str(out)),
    }
    write_folder(out, writers[to])


def _write_hub_folder(run: Run, name: str, license: str, picture: bool, folder: Path) -> None:
    shutil.copytree(run.weights, folder, dirs_exist_ok=True)
    raw = parse_yaml((run.folder / CONFIG).read_text(encoding="utf-8"), CONFIG)
    (folder / CONFIG).write_text(config_without_secrets(raw), encoding="utf-8")
    outcome = evaluation_of(run)
    shown = picture_of(run, outcome) if picture else None
    if shown is not None:
        shutil.copyfile(shown, folder / PICTURE)
    card = model_card(run, name, license, outcome, shown is not None)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_comfyui(run: Run, folder: Path) -> None:
    from safetensors.torch import save_file

    kind = run.config.generator.type
    if kind not in FAMILIES:
        raise ConfigError(
            f"--to comfyui: generator.type must be one of {', '.join(FAMILIES)}, got {kind!r}; "
            "export --to hub-folder or merged"
        )
    if not run.is_lora:
        raise ConfigError(
            "--to comfyui: must be the run of a LoRA, got one of all weights (lora: null); export "
            "--to hub-folder or merged"
        )
    tensors = comfyui_tensors(run.weights / LORA_FILE)
    save_file(tensors, folder / f"{run.config.name}.safetensors", {"format": "pt"})


def _write_merged(run: Run, name: str, folder: Path) -> None:
    config: Any = run.config.generator
    if not isinstance(config, PipelineConfig):
        raise ConfigError(f"--to merged: {config.type!r} must be a diffusers pipeline, it is not")
    if config.quantization is not None:
        raise ConfigError(
            f"--to merged: generator.quantization must be null, got {config.quantization!r}: the "
            "LoRA would be added to other weights than it was trained on; export --to hub-folder"
        )
    from diffusers import ModularPipeline

    generator: Any = build_generator(run.config, torch.device("cpu"))
    generator.load_weights(run.weights)
    pipeline = generator.pipeline
    if run.is_lora:
        pipeline.transformer.float()  # a sum in bfloat16 would round most of a small LoRA away
        if config.dtype == "bfloat16":
            _warn_of_rounding(pipeline.transformer)
        pipeline.fuse_lora(components=["transformer"])
        pipeline.unload_lora_weights()
    if isinstance(pipeline, ModularPipeline):
        _save_modular(pipeline, generator.config.path, name, folder)
        return
    for part_name, part in pipeline.components.items():
        if type(part).__module__.startswith("customized_grpo."):  # for what needs torchvision
            pipeline.register_modules(**{part_name: None})
    pipeline.save_pretrained(folder)
    _take_over(pipeline, generator.config.path, folder)


def _save_modular(pipeline: Any, base: str, name: str, folder: Path) -> None:
    """Its index is the base's, but that the parts of that repository are in this folder."""
    source = resolve_checkpoint(base)
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)
    index = type(pipeline).load_config(source)
    _copy_missing(source, list(own_parts(index)), folder)
    here = {part.name for part in folder.iterdir()} & index.keys()
    index |= {part: placed(index[part], part, name) for part in here}
    text = json.dumps(index, indent=2) + "\n"
    (folder / MODULAR_INDEX).write_text(text, encoding="utf-8")


@torch.no_grad()
def _warn_of_rounding(transformer: nn.Module) -> None:
    """Says how much of the LoRA whoever loads the sum in the base's bfloat16 would lose."""
    from peft.tuners.lora import LoraLayer

    lost = whole = 0.0
    layers: list[Any] = [m for m in transformer.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        (name,) = layer.active_adapters
        delta = layer.get_delta_weight(name)
        merged = layer.get_base_layer().weight + delta
        lost += (merged.bfloat16() - merged).square().sum().item()
        whole += delta.square().sum().item()
    logger.warning(
        "the merged transformer is saved in float32: in bfloat16 its weights would be off by %.0f "
        "%% of what the LoRA adds; load it by from_pretrained(..., dtype=torch.float32), or export "
        "--to hub-folder for a base in bfloat16",
        100 * (lost / whole) ** 0.5 if whole else 0.0,
    )


def _take_over(pipeline: Any, base: str, folder: Path) -> None:
    """Components that were not loaded here, such as a processor, as the base has them."""
    source = resolve_checkpoint(base)
    entries = type(pipeline).load_config(source)
    parts = [n for n, e in entries.items() if isinstance(e, list | tuple) and e[0]]
    missing = _copy_missing(source, parts, folder)
    if not missing:
        return
    index = folder / "model_index.json"
    taken = {name: list(entries[name]) for name in missing}
    content = json.loads(index.read_text(encoding="utf-8")) | taken
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_missing(source: str, parts: list[str], folder: Path) -> list[str]:
    """Folders of a checkpoint that ``folder`` has not yet; their names."""
    from huggingface_hub import snapshot_download

    missing = [name for name in parts if not (folder / name).exists()]
    if missing and not Path(source).is_dir():
        source = snapshot_download(source, allow_patterns=[f"{name}/*" for name in missing])
    for name in missing:
        shutil.copytree(Path(source, name), folder / name)
    return missing
