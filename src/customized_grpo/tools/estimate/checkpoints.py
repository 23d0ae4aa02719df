"""Classes and configs of a checkpoint's models: written down here, in its folder, or on the hub."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from customized_grpo.assets import one_line, resolve_checkpoint
from customized_grpo.errors import ConfigError
from customized_grpo.generators.modular import MODULAR_INDEX, own_parts
from customized_grpo.rewards.loading import find_file
from customized_grpo.tools.estimate.architectures import FAMILIES, PIPELINES, REWARDS, Component
from customized_grpo.tools.estimate.counting import make_fake, on_meta

_DEFAULT_TEXT_TOKENS = 512
_CHAT_TOKENS = {  # a prompt and what is written around it, by the transformer that reads them
    "QwenImageTransformer2DModel": 64,
    "QwenImage21Transformer2DModel": 64,
    "Flux3Transformer2DModel": 80,  # padded to a multiple
}


def pipeline_components(path: str) -> dict[str, Component]:
    """The models of a pipeline checkpoint, or a ConfigError: transformer, vae, text_encoder, ..."""
    if path in PIPELINES:
        return PIPELINES[path]
    return {
        name: (kind, _read(path, f"{name}/config.json"))
        for name, kind in _classes(path).items()
        if name.startswith(("transformer", "vae", "text_encoder"))
    }


def _classes(path: str) -> dict[str, str]:
    """Of a pipeline's parts, by their names."""
    try:
        modular = own_parts(_read(path, MODULAR_INDEX))
    except ConfigError:
        index = _read(path, "model_index.json")
        return {name: part[1] for name, part in index.items() if isinstance(part, list)}
    return {name: settings["type_hint"][1] for name, (_, _, settings) in modular.items()}


def counted_path(kind: str, path: str) -> str:
    """The checkpoint whose shapes are counted: the one asked for, or where its configs cannot be
    read (yet) the usual one of its family; a ConfigError if there is none."""
    try:
        pipeline_components(path)
    except ConfigError:
        if kind not in FAMILIES:
            raise
        usual = FAMILIES[kind]
        return usual.replace("4B", "9B") if "9b" in path.lower() else usual
    return path


def reward_component(path: str) -> Component:
    """The model of a reward's checkpoint, or a ConfigError."""
    if path in REWARDS:
        return REWARDS[path]
    config = _read(path, "config.json")
    return config["architectures"][0], config


def text_tokens(path: str) -> int:
    """Tokens to which a pipeline pads a prompt if its config says nothing."""
    components = pipeline_components(path)
    if number := _CHAT_TOKENS.get(components["transformer"][0]):
        return number
    if path in PIPELINES:
        return _DEFAULT_TEXT_TOKENS
    folder = "tokenizer_2" if "text_encoder_2" in components else "tokenizer"
    limit = _read(path, f"{folder}/tokenizer_config.json").get("model_max_length")
    return min(limit or _DEFAULT_TEXT_TOKENS, _DEFAULT_TEXT_TOKENS)


def _read(path: str, name: str) -> dict[str, Any]:
    with one_line(f"path: {path!r} has no readable {name}"):
        found: dict[str, Any] = json.loads(find_file(resolve_checkpoint(path), name).read_text())
    return found


def build(component: Component, dtype: torch.dtype, **changes: Any) -> Any:
    """A component on the meta device, with some fields of its config changed."""
    import diffusers
    import transformers

    kind, config = component
    library: Any = diffusers if hasattr(diffusers, kind) else transformers
    if not hasattr(library, kind):
        raise ConfigError(f"path: a {kind} cannot be counted; there is none in diffusers")
    cls, config = getattr(library, kind), {**config, **changes}
    with on_meta(dtype):
        if library is diffusers:
            return cls.from_config(config).eval()
        return cls(cls.config_class(**config)).eval()


def skeleton(component: Component, dtype: torch.dtype) -> Any:
    """A frozen component of fake tensors, to be run inside ``on_skeletons``."""
    model = build(component, dtype).requires_grad_(False)
    make_fake(model)
    return model


def parameters(module: nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in module.parameters())
