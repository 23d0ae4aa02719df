"""Loading of reward models: frozen, never from a pickle, every failure one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from customized_grpo.assets import check_finite, one_line, resolve_checkpoint
from customized_grpo.errors import ConfigError

_shared: WeakValueDictionary[tuple[Any, str, torch.device], Any] = WeakValueDictionary()


def load_model(
    cls: Any, path: str, device: torch.device, field: str = "path", unused: str = ""
) -> Any:
    """A transformers model in float32, for inference only.

    Rewards that name the same checkpoint share one copy of it.

    Args:
        cls: class with ``from_pretrained``.
        path: folder, hub id or ``embedded:NAME``.
        device: where the weights go.
        field: of the config, for the message.
        unused: how the names of weights begin that may be missing; '' = none may.

    Raises:
        ConfigError: if there is no such checkpoint, or it is of another kind.
    """
    folder = resolve_checkpoint(path, field)

    def load() -> Any:
        with one_line(f"{field}: {path!r} is not a {cls.__name__} checkpoint"):
            model, info = cls.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        missing = sorted(info["missing_keys"])
        if missing := [key for key in missing if not (unused and key.startswith(unused))]:
            raise ConfigError(
                f"{field}: {path!r} must hold all weights of a {cls.__name__}, got none for "
                f"{missing[0]!r} ({len(missing)} missing); give a checkpoint of that class"
            )
        check_finite(model.state_dict(), f"{field}: {path!r}")
        return freeze(model, device)

    return once((cls, folder, torch.device(device)), load)


def once(key: tuple[Any, str, torch.device], load: Callable[[], Any]) -> Any:
    """What ``load`` gives; the same for a key as long as anyone uses it."""
    model = _shared.get(key)
    if model is None:
        _shared[key] = model = load()
    return model


def load_tokenizer(path: str, field: str = "path") -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ConfigError: if it has none.
    """
    from transformers import AutoTokenizer

    with one_line(f"{field}: {path!r} has no tokenizer"):
        return AutoTokenizer.from_pretrained(
            resolve_checkpoint(path, field), trust_remote_code=False
        )


def load_layout(build: Callable[[], nn.Module], state: dict[str, Tensor], what: str) -> nn.Module:
    """A module made by ``build`` with the tensors of ``state``, which must fit it exactly.

    The weights are never initialised: a large model costs its checkpoint, once.

    Raises:
        ConfigError: opened by ``what``, if names or shapes differ.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module = build()
    with one_line(what):
        module.load_state_dict(state, strict=True, assign=True)
    return module


def freeze(model: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """Moves a model to the device, in evaluation mode and without gradients; buffers keep their
    precision."""
    model = model.to(device).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def read_tensors(path: str, name: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a ``.pt`` file that holds nothing but tensors.

    Args:
        path: folder or hub id.
        name: file in it.

    Raises:
        ConfigError: if it is missing, unreadable or could run code.
    """
    from safetensors.torch import load_file

    with one_line(f"path: {path!r} has no readable {name}"):
        file = find_file(resolve_checkpoint(path), name)
        safe = file.suffix == ".safetensors"
        loaded: Any = load_file(file) if safe else torch.load(file, "cpu", weights_only=True)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(
            f"path: {name} of {path!r} must hold named tensors, got {type(loaded).__name__}; "
            "convert it to safetensors"
        )
    check_finite(state, f"path: {name} of {path!r}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def find_file(path: str, name: str) -> Path:
    """A file of a folder or hub id; downloads it if need be.

    Raises:
        OSError: if there is none.
    """
    from huggingface_hub import hf_hub_download

    return Path(path) / name if Path(path).is_dir() else Path(hf_hub_download(path, name))
