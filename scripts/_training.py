"""What the three training scripts of the embedded models share: schedule, EMA, resumable state."""

from __future__ import annotations

import json
import math
import os
import re
import time
from pathlib import Path

import torch
from torch import Tensor, nn


def cosine_lr(step: int, *, peak: float, num_steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
    progress = step / num_steps
    return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


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


def make_optimizers(module: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon (arXiv:2502.16982) for the linear layers inside blocks, AdamW for everything else.

    ``match_rms_adamw`` lets both share one learning rate.
    """
    inside = re.compile(r"(blocks?|layers?)\.\d+\.")
    matrices = [
        layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and inside.search(name) and "norm" not in name
    ]
    chosen = {id(weight) for weight in matrices}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01)
    if not matrices:
        return [adamw]
    return [torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), adamw]


class Run:
    """State of one training run: ``state.pt`` (atomic, ``weights_only``) and ``log.jsonl``."""

    def __init__(self, folder: Path, module: nn.Module, *, peak_lr: float, num_steps: int) -> None:
        self.folder, self.module = folder, module
        self.peak_lr, self.num_steps = peak_lr, num_steps
        folder.mkdir(parents=True, exist_ok=True)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(module)
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

    def generator(self, seed: int) -> torch.Generator:
        """The random numbers of the current step: a resumed run draws what the first would have."""
        return torch.Generator().manual_seed(seed * 1_000_003 + self.step)

    def update(self, loss: Tensor, **numbers: float) -> None:
        """One optimizer step; logs every 50 and saves every 500."""
        lr = cosine_lr(self.step, peak=self.peak_lr, num_steps=self.num_steps)
        self.module.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
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
