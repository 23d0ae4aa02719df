"""The checkpoints that a config names: here and complete, or to be had from the hub."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from customized_grpo.assets import resolve_checkpoint
from customized_grpo.config import RunConfig
from customized_grpo.errors import ConfigError
from customized_grpo.tools.doctor import folders, hub
from customized_grpo.tools.doctor.findings import Finding, from_error, gigabytes, ok, problem

# Fields of the plugs of this package that name a checkpoint. Of hpsv2, hpsv3 and pickscore a second
# one gives shapes, tokenizer and preprocessing only.
_FIELDS: dict[str, folders.Kind] = {
    "path": "model",
    "segmenter": "model",
    "uno_lora": "lora",
    "clip": "texts",
    "base": "texts",
    "processor": "texts",
}
_OURS = "customized_grpo."


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One that a config names."""

    field: str
    path: str
    kind: folders.Kind
    file: str | None = None
    """Of the weights, where their name is not the usual one."""


def named(config: RunConfig) -> list[Checkpoint]:
    """All checkpoints of a config, each once: the first field that names it counts."""
    found = list(_of_plug("generator", config.generator, "pipeline"))
    for section in ("rewards", "evaluators"):
        for number, plug in enumerate(getattr(config, section)):
            found += _of_plug(f"{section}.{number}", plug, "model")
    if config.evaluation.classifier is not None:
        path = config.evaluation.classifier
        found.append(Checkpoint(field="evaluation.classifier", path=path, kind="model"))
    first = {(c.path, c.kind, c.file): c for c in reversed(found)}
    return [c for c in found if first[c.path, c.kind, c.file] is c]


def _of_plug(section: str, plug: Any, kind: folders.Kind) -> Iterator[Checkpoint]:
    if not type(plug).__module__.startswith(_OURS):  # its fields may mean anything
        return
    for name in (field.name for field in fields(plug)):
        path = getattr(plug, name)
        if name in _FIELDS and path is not None:
            own = kind if name == "path" else _FIELDS[name]
            file = getattr(plug, "file", None) if name == "path" else None
            yield Checkpoint(field=f"{section}.{name}", path=path, kind=own, file=file)


def weights(config: RunConfig) -> Iterator[Finding]:
    """A finding for every checkpoint, and for plugs that only their own package can check."""
    for checkpoint in named(config):
        yield _weights(checkpoint)
    plugs = (config.generator, *config.rewards, *config.evaluators)
    others = {plug.type for plug in plugs if not type(plug).__module__.startswith(_OURS)}
    for other in sorted(others):
        yield ok(f"type {other}", "a plug of another package: what it loads is not checked")


def _weights(checkpoint: Checkpoint) -> Finding:
    path = Path(checkpoint.path).expanduser()
    if checkpoint.kind == "lora" and path.is_file():
        return _local(checkpoint, path.parent, path.name)
    try:
        place = resolve_checkpoint(checkpoint.path)
    except ConfigError as error:
        return from_error(checkpoint.field, error)
    if Path(place).is_dir():
        return _local(checkpoint, Path(place), checkpoint.file)
    return hub.on_hub(checkpoint.field, place, checkpoint.kind, checkpoint.file)


def _local(checkpoint: Checkpoint, folder: Path, file: str | None) -> Finding:
    fix = "restore it, or download it again: hf download OWNER/NAME --local-dir "
    fix += shlex.quote(str(folder))
    if checkpoint.path.startswith("embedded:"):
        fix = "reinstall it: pip install --force-reinstall --no-deps customized-grpo"
    try:
        gaps = folders.gaps(folder, checkpoint.kind, file)
    except (OSError, ValueError, KeyError, AttributeError) as error:  # of a damaged JSON file
        return problem(checkpoint.field, f"{folder} cannot be read: {error!r}", fix)
    if gaps:
        return problem(checkpoint.field, f"{folder}: {'; '.join(gaps)}", fix)
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors") if f.is_file())
    return ok(checkpoint.field, f"{checkpoint.path} is complete, {gigabytes(size)} of weights")
