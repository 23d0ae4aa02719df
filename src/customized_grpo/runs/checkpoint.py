"""Checkpoints: whatever a run needs to go on as if it had never stopped.

A checkpoint is a folder ``checkpoints/<update>`` of

* ``weights/``: the trained weights (their average, if there is one) in the family's format, to be
  loaded like those of a finished run;
* ``state.safetensors``: trained parameters, optimizer, moving average, the older parameters that
  sample where the algorithm has some, random state;
* ``state.json``: counters, and the config by which the run got here;
* ``manifest.json``: a SHA-256 of every file; written last.

It appears under its name by one rename, when all of it is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from customized_grpo.errors import CheckpointError
from customized_grpo.files import filled, remove, replace_folder
from customized_grpo.runs.ema import Ema
from customized_grpo.runs.files import CHECKPOINTS, checkpoint_folders, hint_at_run
from customized_grpo.runs.sharding import split_like, whole

logger = logging.getLogger("customized_grpo")

WEIGHTS = "weights"
_TENSORS, _RECORD, _MANIFEST = "state.safetensors", "state.json", "manifest.json"

# What a damaged checkpoint raises when it is read. Any other OSError (a network's file system, too
# many open files) may pass, and says nothing of what is on the disk.
_DAMAGE = (
    FileNotFoundError, NotADirectoryError, ValueError, KeyError, AttributeError, SafetensorError,
)  # fmt: skip


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run has come; everything else about its next rollout follows from the config."""

    update: int = 0
    """Optimizer updates done, skipped ones included."""
    rollouts: int = 0
    """Rollouts done; the next one's number, from which its data and noise are drawn."""
    skipped: int = 0
    """Updates skipped in a row, up to now."""
    base: dict[str, float] = field(default_factory=dict)
    """Validation scores before the first update."""
    validation: dict[str, float] = field(default_factory=dict)
    """Validation scores after the last update; empty if there were none."""
    best: float | None = None
    """Highest score so far."""

    def score(self) -> float | None:
        """Relative gain on the base of the evaluator that has gained least; None: not known."""
        others = ("validation/reward/", "validation/share/")  # an evaluator's name may have a slash
        names = [n for n in self.base if n.startswith("validation/") and not n.startswith(others)]
        gains = [
            (self.validation[name] - self.base[name]) / abs(self.base[name])
            for name in names
            if name in self.validation and self.base[name]
        ]
        return min(gains) if gains and all(map(math.isfinite, gains)) else None

    def note_best(self) -> bool:
        """Whether there has been nothing better than now."""
        score = self.score()
        if score is None or not score > (-math.inf if self.best is None else self.best):
            return False
        self.best = score
        return True


class TrainingState:
    """What changes in the course of a run, as named tensors."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: Ema | None,
        old: Ema | None = None,
    ) -> None:
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._optimizer = optimizer
        averages = {"ema": ema, "old": old}
        self._averages = {kind: a for kind, a in averages.items() if a is not None}

    def tensors(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Copies on the CPU; of the optimizer's plain numbers too.

        Where the model is sharded, every process has to ask: whole tensors are put together one by
        one, and only who is to ``keep`` them gets any.
        """
        found: dict[str, Tensor] = {f"policy/{n}": p for n, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state[parameter].items():
                found[f"optimizer/{name}/{key}"] = torch.as_tensor(value)
        for kind, average in self._averages.items():
            tensors = zip(self._parameters, average.average, strict=True)
            found |= {f"{kind}/{name}": tensor for name, tensor in tensors}
        found["random/cpu"] = torch.get_rng_state()
        for number, state in enumerate(_cuda_random_states()):
            found[f"random/cuda{number}"] = state
        copies: dict[str, Tensor] = {}
        for name, tensor in found.items():
            full = whole(tensor.detach())
            if keep:
                copies[name] = full.to("cpu", copy=True).contiguous()
        return copies

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Puts copies back.

        Raises:
            CheckpointError: if they are of another model, LoRA or optimizer.
        """
        self._check(tensors)
        for name, parameter in self._parameters.items():
            parameter.copy_(split_like(tensors[f"policy/{name}"], parameter))
        states: dict[int, dict[str, Any]] = {}
        for index, (name, parameter) in enumerate(self._parameters.items()):
            prefix = f"optimizer/{name}/"
            found = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            if found:
                states[index] = {k: _plain(split_like(t, parameter)) for k, t in found.items()}
        groups = self._optimizer.state_dict()["param_groups"]  # as the config says now
        self._optimizer.load_state_dict({"state": states, "param_groups": groups})
        for kind, average in self._averages.items():
            for name, tensor in zip(self._parameters, average.average, strict=True):
                tensor.copy_(split_like(tensors[f"{kind}/{name}"], tensor))
        torch.set_rng_state(tensors["random/cpu"])
        for number in range(len(_cuda_random_states())):
            if f"random/cuda{number}" in tensors:
                torch.cuda.set_rng_state(tensors[f"random/cuda{number}"], number)

    def _check(self, tensors: dict[str, Tensor]) -> None:
        kinds = ["policy", *self._averages]
        wanted = {f"{kind}/{n}": p.shape for kind in kinds for n, p in self._parameters.items()}
        known = ("policy", "ema", "old")
        found = {n: t.shape for n, t in tensors.items() if n.split("/")[0] in known}
        for name in sorted(wanted.keys() ^ found.keys()):
            where = "the run" if name in wanted else "the checkpoint"
            raise CheckpointError(
                f"{name} is in {where} only; the model, lora, algorithm or train.ema_decay has "
                "changed"
            )
        for name, shape in wanted.items():
            if found[name] != shape:
                raise CheckpointError(
                    f"{name} is {tuple(found[name])} in the checkpoint and {tuple(shape)} in the "
                    "run; the model or lora has changed"
                )


def _plain(tensor: Tensor) -> Tensor | int:
    """The 8-bit optimizer counts its steps in an int."""
    return int(tensor) if tensor.dtype == torch.int64 and not tensor.dim() else tensor


def _cuda_random_states() -> list[Tensor]:
    """None on the CPU, where asking would take memory of every GPU."""
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One that was read and found whole."""

    folder: Path
    record: dict[str, Any]
    """What ``state.json`` holds."""

    @property
    def update(self) -> int:
        """Optimizer updates done."""
        return int(self.folder.name)

    def tensors(self) -> dict[str, Tensor]:
        """Reads ``state.safetensors``."""
        return load_file(self.folder / _TENSORS)


class CheckpointStore:
    """The checkpoints of a run: writes beside the training, keeps the last few and the best."""

    def __init__(self, run: Path, keep: int) -> None:
        self._folder, self._keep = run / CHECKPOINTS, keep
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(
        self,
        update: int,
        tensors: dict[str, Tensor],
        record: dict[str, Any],
        save_weights: Callable[[Path], None],
    ) -> None:
        """Writes a checkpoint; returns when ``save_weights`` has written its part.

        ``record["score"]`` (float or None) is what the best one is best at. Waits for the
        checkpoint before, if that is still being written.

        Raises:
            OSError: if this one's weights, or the one before, could not be written.
        """
        self.wait()
        weights = self._folder / f"{_name(update)}.{WEIGHTS}"
        with filled(weights):
            save_weights(weights)
        self._writing = self._worker.submit(self._write, update, tensors, record, weights)

    def wait(self) -> None:
        """Until the last checkpoint is on the disk.

        Raises:
            OSError: if it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(
        self, update: int, tensors: dict[str, Tensor], record: dict[str, Any], weights: Path
    ) -> None:
        def fill(folder: Path) -> None:
            weights.rename(folder / WEIGHTS)
            save_file(tensors, folder / _TENSORS)
            (folder / _RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
            digests = {str(f.relative_to(folder)): _digest(f) for f in _files(folder)}
            (folder / _MANIFEST).write_text(json.dumps(digests) + "\n", encoding="utf-8")

        replace_folder(self._folder / _name(update), fill)
        folders = checkpoint_folders(self._folder.parent)
        try:
            scores = {folder: _score(folder) for folder in folders}
        except OSError as error:  # whose score is not known may be the best
            logger.warning("no checkpoint is removed this time: %s", error)
            return
        best = max(folders, key=scores.__getitem__)
        for folder in folders[: -self._keep]:
            if folder != best or scores[folder] == -math.inf:
                remove(folder)


def _score(folder: Path) -> float:
    try:
        score = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["score"]
    except _DAMAGE:
        return -math.inf
    return score if score is not None and math.isfinite(score) else -math.inf


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The last one that is whole; a damaged one is named in a warning. None if none was written.

    Raises:
        CheckpointError: if there are some and all of them are damaged.
    """
    return _first_whole(run, checkpoint_folders(run)[::-1])


def best_checkpoint(run: Path) -> Checkpoint | None:
    """The one with the highest score that is whole, the later of equals; else as the newest.

    Raises:
        CheckpointError: if there are some and all of them are damaged.
    """
    folders = checkpoint_folders(run)
    best_first = sorted(folders, key=lambda f: (_score(f), int(f.name)), reverse=True)
    return _first_whole(run, best_first)


def _first_whole(run: Path, folders: Sequence[Path]) -> Checkpoint | None:
    damages = []
    for folder in folders:
        try:
            record = _verify(folder)
        except _DAMAGE as error:
            damages.append(f"{folder}: {error}")
            logger.warning("checkpoint %s is damaged, taking another", damages[-1])
            continue
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be read: {error}; try again, or delete it to take another"
            ) from error
        return Checkpoint(folder=folder, record=record)
    if damages:
        raise CheckpointError(
            f"{run}: every checkpoint is damaged ({'; '.join(damages)}); bring one back from a "
            f"copy, or delete {run / CHECKPOINTS} to begin again at update 0"
        )
    return None


def trained_weights(run: Path) -> Path:
    """Folder of a run's trained weights: those of its end, or else of its newest checkpoint.

    Raises:
        CheckpointError: if it has neither.
    """
    if (run / WEIGHTS).exists():
        return run / WEIGHTS
    newest = newest_checkpoint(run)
    if newest is None:
        raise CheckpointError(
            f"RUN: {run} must be the folder of a run that has written weights, there are none yet"
            f"{hint_at_run(run)}"
        )
    logger.info("%s is not finished: taking the weights after update %d", run, newest.update)
    return newest.folder / WEIGHTS


def _verify(folder: Path) -> dict[str, Any]:
    """The record, when every file is as it was written.

    Raises:
        ValueError: naming the first file that is not.
    """
    digests = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    found = {str(file.relative_to(folder)) for file in _files(folder)} - {_MANIFEST}
    for name in sorted(found ^ digests.keys()):
        raise ValueError(f"{name} is {'missing' if name in digests else 'not in its manifest'}")
    for name, digest in digests.items():
        if _digest(folder / name) != digest:
            raise ValueError(f"{name} has another checksum than when it was written")
    return json.loads((folder / _RECORD).read_text(encoding="utf-8"))


def _files(folder: Path) -> list[Path]:
    """All of them, also below.

    Raises:
        OSError: if a folder cannot be listed, which ``rglob`` would take for empty.
    """

    def fail(error: OSError) -> None:
        raise error

    listed = os.walk(folder, onerror=fail)
    return sorted(Path(place, name) for place, _, names in listed for name in names)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _name(update: int) -> str:
    return f"{update:06d}"
