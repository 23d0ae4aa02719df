"""Whether a folder of weights is complete, by names and headers: no weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from customized_grpo.config.plugs import CheckpointKind
from customized_grpo.generators.modular import MODULAR_INDEX, own_parts

_WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_INDEX = "*.safetensors.index.json"
_POINTER = b"version https://git-lfs"


def gaps(folder: Path, kind: CheckpointKind, file: str | None = None) -> list[str]:
    """What is missing or damaged, by its name in the folder; [] = it is complete.

    ``file`` names the weights where they have not the usual name of a ``kind``.
    """
    if file is not None:
        return list(_damages(folder, [file]))
    found = {"pipeline": _pipeline, "model": _model, "lora": _lora, "texts": _texts, "any": _any}
    try:
        return list(found[kind](folder))
    except (OSError, ValueError, KeyError, AttributeError) as error:  # a damaged JSON file
        return [f"it cannot be read: {error!r}"]


def _pipeline(folder: Path) -> Iterator[str]:
    index, modular = folder / "model_index.json", folder / MODULAR_INDEX
    if index.is_file():
        parts = {n: e for n, e in _read(index).items() if isinstance(e, list) and e[:1] != [None]}
    elif modular.is_file():
        parts = own_parts(_read(modular))
    else:
        yield "model_index.json is missing"
        return
    for name in parts:
        if not (folder / name).is_dir() or not any((folder / name).iterdir()):
            yield f"{name}/ is missing"
        elif name.startswith(("transformer", "vae", "text_encoder")):
            yield from (f"{name}/{gap}" for gap in _model(folder / name))


def _model(folder: Path) -> Iterator[str]:
    if not (folder / "config.json").is_file():
        yield "config.json is missing"
    shards = [name for index in folder.glob(_INDEX) for name in _read(index)["weight_map"].values()]
    whole = [name for name in _WHOLE if (folder / name).is_file()]
    if shards or whole:
        yield from _damages(folder, sorted({*shards, *whole}))
    elif any(folder.glob("*.safetensors")):
        yield f"{_INDEX} is missing, which says what is in which file"
    elif pickles := sorted(folder.glob("*.bin")):
        yield f"model.safetensors is missing; {pickles[0].name} is a pickle, which is never loaded"
    else:
        yield "model.safetensors is missing"


def _lora(folder: Path) -> Iterator[str]:
    if not any(folder.glob("*.safetensors")):
        yield "*.safetensors is missing"
    yield from _any(folder)


def _texts(folder: Path) -> Iterator[str]:
    names = ("config.json", "tokenizer_config.json")
    yield from (f"{name} is missing" for name in names if not (folder / name).is_file())


def _any(folder: Path) -> Iterator[str]:
    yield from _damages(folder, [path.name for path in sorted(folder.glob("*.safetensors"))])


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _damages(folder: Path, names: list[str]) -> Iterator[str]:
    for name in names:
        if text := _damage(folder / name):
            yield f"{name} {text}"


def _damage(file: Path) -> str | None:
    """What is wrong with a file of weights, by its header and length; None: nothing."""
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as opened:
            head = opened.read(len(_POINTER))
        if not head or head == _POINTER:
            return "is a Git LFS pointer, not the weights" if head else "is empty"
        if file.suffix == ".safetensors":
            safe_open(file, "np")
    except FileNotFoundError:
        return "is missing"
    except (OSError, SafetensorError) as error:
        return f"is damaged ({' '.join(str(error).split())})"
    return None
