"""What the training scripts of the embedded models share: schedule, EMA, resumable state."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


def trapezoid_lr(step: int, *, peak: float, num_steps: int, warmup: int = 100) -> float:
    """Linear warm-up, constant, and a linear fall to 2 % of the peak over the last fifth.

    The constant part makes a run that is to be longer one that goes on: no step was for nothing.
    """
    left = (num_steps - step) / (0.2 * num_steps)
    return peak * min(1.0, (step + 1) / warmup, max(0.02, left))


class Ema:
    """Exponential moving average of named tensors; the decay warms up with the step."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.shadow[name].lerp_(value, weight)
            else:
                self.shadow[name].copy_(value)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight that Muon trains, and the 2-D view of the same memory that Muon sees."""

    weight: nn.Parameter
    view: nn.Parameter


def find_matrices(module: nn.Module) -> list[Matrix]:
    """Linear layers and convolutions (as ``[out, kernel * in]``) inside blocks."""
    inside = re.compile(r"(blocks?|layers?)\.\d+\.")
    matrices = []
    for name, layer in module.named_modules():
        if not inside.search(f"{name}.") or "norm" in name:
            continue
        if isinstance(layer, nn.Linear):
            matrices.append(Matrix(layer.weight, layer.weight))
        elif isinstance(layer, nn.Conv2d):
            channels_last = layer.weight.data.permute(0, 2, 3, 1)
            flat = channels_last.view(len(channels_last), -1)
            matrices.append(Matrix(layer.weight, nn.Parameter(flat)))
    return matrices


def make_optimizers(module: nn.Module, matrices: list[Matrix]) -> list[torch.optim.Optimizer]:
    """Muon (arXiv:2502.16982) for the matrices, AdamW for everything else.

    ``match_rms_adamw`` lets both share one learning rate.
    """
    chosen = {id(matrix.weight) for matrix in matrices}
    rest = [p for p in module.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01)
    if not matrices:
        return [adamw]
    views = [matrix.view for matrix in matrices]
    return [torch.optim.Muon(views, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), adamw]


def rng_of(seed: int, step: int, device: str = "cpu") -> torch.Generator:
    """The random numbers of a step: a resumed run draws what the first would have."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


class _Steps(Dataset):
    """Item ``i`` is the batch of step ``i``, whichever process draws it."""

    def __init__(self, draw: Callable[[torch.Generator], tuple[Tensor, ...]], seed: int) -> None:
        self._draw, self._seed = draw, seed

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        return self._draw(rng_of(self._seed, step))


def batches(
    draw: Callable[[torch.Generator], tuple[Tensor, ...]], steps: range, *, seed: int, workers: int
) -> Iterable[tuple[Tensor, ...]]:
    """What ``draw`` makes of each step's random numbers, in order; by processes if ``workers``."""
    return DataLoader(
        _Steps(draw, seed),
        sampler=steps,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
    )


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


def to_bytes(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as uint8: a quarter of the memory on the way to a GPU."""
    return (images * 255).round().byte()


class Run:
    """State of one training run: ``state.pt`` (atomic, ``weights_only``) and ``log.jsonl``."""

    def __init__(self, folder: Path, module: nn.Module, *, peak_lr: float, num_steps: int) -> None:
        self.folder, self.module = folder, module
        module.to(memory_format=torch.channels_last)  # pyright: ignore
        self.peak_lr, self.num_steps = peak_lr, num_steps
        folder.mkdir(parents=True, exist_ok=True)
        self.matrices = find_matrices(module)
        self.optimizers = make_optimizers(module, self.matrices)
        self.ema = Ema(module)
        self.step, self._started, self._loss = 0, time.time(), float("nan")
        self._resume()

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.module.load_state_dict(state["module"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.ema.shadow = state["ema"]
            self.step = state["step"]

    def rng(self, seed: int, device: str = "cpu") -> torch.Generator:
        return rng_of(seed, self.step, device)

    @property
    def left(self) -> range:
        return range(self.step, self.num_steps)

    def update(self, loss: Tensor, **numbers: float) -> None:
        """One optimizer step; logs every 50 and saves every 500."""
        lr = trapezoid_lr(self.step, peak=self.peak_lr, num_steps=self.num_steps)
        self.module.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for matrix in self.matrices:
            if matrix.view is not matrix.weight:
                grad = cast("Tensor", matrix.weight.grad)
                matrix.view.grad = grad.permute(0, 2, 3, 1).reshape(matrix.view.shape)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self.ema.update(self.module, self.step)
        self.step += 1
        value = loss.item()
        self._loss = value if math.isnan(self._loss) else 0.98 * self._loss + 0.02 * value
        if self.step % 50 == 0:
            self._log(numbers)
        if self.step % 500 == 0 or self.step == self.num_steps:
            self.save()

    def _log(self, numbers: dict[str, float]) -> None:
        row = {"step": self.step, "loss": round(self._loss, 5)}
        row |= {k: round(v, 5) for k, v in numbers.items()}
        row["seconds"] = round(time.time() - self._started, 1)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def save(self) -> None:
        """Writes the state to a temporary file and renames it."""
        state = {
            "module": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema.shadow,
            "step": self.step,
        }
        temporary = self.folder / "state.pt.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.folder / "state.pt")
