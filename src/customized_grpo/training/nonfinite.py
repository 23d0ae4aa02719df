"""An update whose gradient is not finite: where it comes from, and a folder that shows it again.

``cgrpo replay`` computes the update in such a folder once more.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from customized_grpo.config import ForwardAlgorithm, RunConfig, dump_config, load_config
from customized_grpo.devices import pick_device
from customized_grpo.errors import CheckpointError
from customized_grpo.files import replace_folder
from customized_grpo.generators.base import Conditioning
from customized_grpo.runs.checkpoint import TrainingState
from customized_grpo.runs.ema import Ema
from customized_grpo.runs.sharding import whole
from customized_grpo.training.algorithms import make_algorithm
from customized_grpo.training.build import (
    build_generator,
    from_own_start,
    make_optimizer,
    make_trainable,
)
from customized_grpo.training.loss import accumulate_gradient, outputs
from customized_grpo.training.policy import Policy, make_policy
from customized_grpo.types import Batch, ForwardBatch, PolicyBatch

REPORT = "diagnosis.json"
_STATE = "state.safetensors"
_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What is not finite in an update."""

    parameters: tuple[str, ...]
    """Trained tensors that are not finite themselves."""
    gradients: tuple[str, ...]
    """Trained tensors whose gradient is not."""
    inputs: tuple[str, ...]
    """Fields of the batch that are not, such as ``advantage``."""
    pairs: tuple[tuple[int, int], ...]
    """(sample, step) for which the model's output is not."""

    def __str__(self) -> str:
        pairs = [f"sample {sample} at step {step}" for sample, step in self.pairs]
        parts = {
            "weights": self.parameters,
            "gradients of": self.gradients,
            "inputs": self.inputs,
            "outputs for": pairs,
        }
        found = [f"{kind} {_some(names)}" for kind, names in parts.items() if names]
        return f"not finite: {'; '.join(found)}" if found else "everything is finite"


def _some(names: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@torch.no_grad()
def diagnose(
    policy: Policy,
    batch: Batch,
    conditioning: Conditioning,
    module: nn.Module,
    micro_batch_size: int | None,
) -> Diagnosis:
    """Looks at weights, gradients (as they are now) and batch, and computes the pairs again."""
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    broken = []
    count = len(batch.advantage)  # is 0 in a process whose samples are all invalid
    parts = torch.arange(count).split(micro_batch_size or count) if count else ()
    for rows in parts:
        found = outputs(policy, batch, conditioning, rows.to(batch.advantage.device))
        broken += rows[~found.isfinite().cpu()].tolist()
    return Diagnosis(
        parameters=tuple(n for n, p in trained.items() if not _finite(p)),
        gradients=tuple(
            n for n, p in trained.items() if p.grad is not None and not _finite(p.grad)
        ),
        inputs=tuple(name for name, tensor in _fields(batch).items() if not _finite(tensor)),
        pairs=tuple((int(batch.sample_index[i]), int(batch.step_index[i])) for i in broken),
    )


def _finite(tensor: Tensor) -> bool:
    return bool(whole(tensor).isfinite().all())


def _fields(batch: Batch) -> dict[str, Tensor]:
    found = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: part.contiguous() for name, part in found.items() if isinstance(part, Tensor)}


def dump_failure(
    folder: Path,
    config: RunConfig,
    diagnosis: Diagnosis,
    batch: Batch,
    conditioning: Conditioning,
    state: dict[str, Tensor],
    pinned: bool,
) -> None:
    """Writes all that the update was computed from.

    By several processes, each its own pairs; the first one's folder has the ``state`` of all.
    """

    def fill(target: Path) -> None:
        (target / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        text = json.dumps(asdict(diagnosis) | {"pinned": pinned})
        (target / REPORT).write_text(text, encoding="utf-8")
        save_file(_fields(batch), target / "batch.safetensors")
        save_file(conditioning.tensors(), target / "conditioning.safetensors")
        if state:
            save_file(state, target / _STATE)

    replace_folder(folder, fill)


def load_failure(
    folder: Path, config: RunConfig, device: torch.device
) -> tuple[Batch, Conditioning, dict[str, Tensor], bool]:
    """Batch, conditioning, training state of a dump, and whether the ratio was pinned."""
    parts = {n: t.to(device) for n, t in load_file(folder / "batch.safetensors").items()}
    conditioning = Conditioning.from_tensors(load_file(folder / "conditioning.safetensors"))
    losses = config.algorithm.losses
    return (
        ForwardBatch(losses=losses, clip=config.advantage.clip, **parts)
        if isinstance(config.algorithm, ForwardAlgorithm)
        else PolicyBatch(losses=losses, **parts),
        conditioning.to(device),
        load_file(_state_of(folder)),
        json.loads((folder / REPORT).read_text(encoding="utf-8"))["pinned"],
    )


def _state_of(folder: Path) -> Path:
    """The file of the training state: here, or beside, in the dump of the first process.

    Raises:
        CheckpointError: if that is not there.
    """
    first = folder.with_name(re.sub(r"-rank\d+$", "-rank0", folder.name))
    for place in (folder, first):
        if (place / _STATE).exists():
            return place / _STATE
    raise CheckpointError(
        f"DUMP: {folder} needs {first / _STATE}, which the first process has written for all; "
        "keep the folders of a failure together"
    )


def replay(folder: Path) -> Diagnosis:
    """Loss and gradient of the update in a dump, and what is not finite in them.

    Raises:
        CheckpointError: if the folder is no dump.
    """
    if not (folder / REPORT).exists():
        raise CheckpointError(
            f"DUMP: {folder} must be a folder that a run has written under failures/"
        )
    config = load_config(folder / "config.yaml")
    device = pick_device(config.device)
    generator = build_generator(config, device)
    make_trainable(generator, from_own_start(config, folder.resolve().parent.parent))
    batch, conditioning, state, pinned = load_failure(folder, config, device)
    transformer = generator.transformer
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    decay = config.train.ema_decay
    ema = None if decay is None else Ema(transformer, decay)
    policy, size = make_policy(generator, config), config.train.micro_batch_size
    optimizer, old = make_optimizer(parameters, config.train), make_algorithm(policy, config).old
    TrainingState(transformer, optimizer, ema, old).load(state)
    accumulate_gradient(
        policy,
        batch,
        conditioning,
        config.loss,
        pinned=pinned,
        micro_batch_size=size,
    )
    return diagnose(policy, batch, conditioning, transformer, size)
