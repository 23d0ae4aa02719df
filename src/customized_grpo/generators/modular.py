"""Checkpoints of diffusers' modular pipelines, whose parts may lie in several repositories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from customized_grpo.assets import resolve_checkpoint
from customized_grpo.errors import ConfigError
from customized_grpo.generators.pipeline import (
    PipelineConfig,
    check_components,
    load_text_encoder,
    quantization_config,
)

MODULAR_INDEX = "modular_model_index.json"
_PLACE = "pretrained_model_name_or_path"


def own_parts(index: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of an index by the names of parts: those that lie where the transformer does."""
    parts = {name: part for name, part in index.items() if isinstance(part, list | tuple)}
    place = parts["transformer"][2].get(_PLACE)
    return {name: part for name, part in parts.items() if part[2].get(_PLACE) == place}


def placed(part: Any, name: str, place: str) -> list[Any]:
    """An entry of an index whose part lies elsewhere."""
    library, kind, settings = part
    there = {_PLACE: place, "subfolder": name, "revision": None}
    return [library, kind, {**settings, **there}]


def load_modular(config: PipelineConfig, blocks: Any) -> Any:
    """The pipeline of these blocks but for its tokenizer, safetensors only; in ``loading``.

    Its own loader would only log what cannot be loaded.

    Raises:
        ConfigError: if a part is of another kind, weights are missing or not finite; of the
            libraries anything.
    """
    pipeline = blocks.init_pipeline(resolve_checkpoint(config.path))
    dtype, components = getattr(torch, config.dtype), dict[str, Any]()
    kinds = {spec.name: spec.type_hint for spec in blocks.expected_components}
    for name in sorted(set(pipeline.null_component_names) - {"tokenizer"}):
        spec = pipeline.get_component_spec(name)
        if spec.type_hint is not kinds[name]:
            raise ConfigError(
                f"path: {name} must be a {kinds[name].__name__}, got a {spec.type_hint.__name__}"
                f" in {config.path!r}; give a checkpoint of {config.type}"
            )
        if name == "text_encoder":
            source = spec.pretrained_model_name_or_path
            components[name] = load_text_encoder(spec.type_hint, source, spec.subfolder, dtype)
            continue
        how: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
        if name == "transformer" and config.quantization is not None:
            quantized = quantization_config(config.quantization)
            how["quantization_config"] = quantized.quant_mapping[name]
        components[name] = spec.load(**how if issubclass(spec.type_hint, nn.Module) else {})
    pipeline.update_components(**components)
    check_components(pipeline, config)
    return pipeline
