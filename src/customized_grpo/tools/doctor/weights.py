"""The checkpoints that a config names: here and complete, or to be had from the hub."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path

from customized_grpo.assets import is_embedded, resolve_checkpoint
from customized_grpo.config import Checkpoint, RunConfig
from customized_grpo.errors import ConfigError
from customized_grpo.tools.doctor import folders, hub
from customized_grpo.tools.doctor.findings import Finding, from_error, gigabytes, ok, problem


def named(config: RunConfig) -> list[Checkpoint]:
    """All checkpoints of a config, each once: the first field that names it counts."""
    found: dict[tuple[str, str, str | None], Checkpoint] = {}
    for section, plug in config.plugs().items():
        for c in plug.checkpoints():
            named_so = dataclasses.replace(c, field=f"{section}.{c.field}")
            found.setdefault((c.path, c.kind, c.file), named_so)
    if config.lora is not None and (path := config.lora.path):
        start = Checkpoint(field="lora.path", path=path, kind="lora")
        found.setdefault((path, "lora", None), start)
    if path := config.evaluation.classifier:
        last = Checkpoint(field="evaluation.classifier", path=path, kind="model")
        found.setdefault((path, "model", None), last)
    return list(found.values())


def weights(config: RunConfig) -> Iterator[Finding]:
    """A finding for every checkpoint."""
    return map(_look, named(config))


def _look(checkpoint: Checkpoint) -> Finding:
    path = Path(checkpoint.path).expanduser()
    if checkpoint.kind in ("lora", "any") and path.is_file():
        return _local(checkpoint, path.parent, path.name)
    try:
        place = resolve_checkpoint(checkpoint.path)
    except ConfigError as error:
        return from_error(checkpoint.field, error)
    if Path(place).is_dir():
        return _local(checkpoint, Path(place), checkpoint.file)
    return hub.on_hub(checkpoint, place)


def _local(checkpoint: Checkpoint, folder: Path, file: str | None) -> Finding:
    fix = "restore it, or download it again: hf download OWNER/NAME --local-dir "
    fix += shlex.quote(str(folder))
    if is_embedded(checkpoint.path):
        fix = "reinstall it: pip install --force-reinstall --no-deps customized-grpo"
    if gaps := folders.gaps(folder, checkpoint.kind, file):
        return problem(checkpoint.field, f"{folder}: {'; '.join(gaps)}", fix)
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors") if f.is_file())
    return ok(checkpoint.field, f"{checkpoint.path} is complete, {gigabytes(size)} of weights")
