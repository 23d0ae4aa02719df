"""What the trainer needs of a subject-driven generator: one Protocol, one bag of conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from customized_grpo.errors import DataError
from customized_grpo.types import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditioning:
    """Encoded prompts and references of a batch, in the arguments of the family's transformer."""

    per_sample: dict[str, Tensor]
    """Tensors with a leading batch axis."""
    shared: dict[str, Tensor]
    """Tensors that all samples of equal layout share, such as position ids."""

    def take(self, index: Tensor) -> Conditioning:
        """Rows ``index`` (int64, repeats allowed) of every per-sample tensor."""
        return Conditioning(
            per_sample={name: tensor[index] for name, tensor in self.per_sample.items()},
            shared=self.shared,
        )

    def to(self, device: torch.device) -> Conditioning:
        """The same conditioning on a device."""
        return Conditioning(
            per_sample={name: tensor.to(device) for name, tensor in self.per_sample.items()},
            shared={name: tensor.to(device) for name, tensor in self.shared.items()},
        )

    def cast(self, dtype: torch.dtype) -> Conditioning:
        """Embeddings and latents in another precision; masks and positions as they are."""
        cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in self.per_sample.items()}
        return Conditioning(per_sample=cast, shared=self.shared)

    def tensors(self) -> dict[str, Tensor]:
        """All of it under one flat name each, for a file."""
        kinds = {"per_sample": self.per_sample, "shared": self.shared}
        return {
            f"{kind}.{name}": tensor.contiguous()
            for kind, tensors in kinds.items()
            for name, tensor in tensors.items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Conditioning:
        """What ``tensors`` gave."""
        kinds: dict[str, dict[str, Tensor]] = {"per_sample": {}, "shared": {}}
        for name, tensor in tensors.items():
            kind, _, field = name.partition(".")
            kinds[kind][field] = tensor
        return cls(**kinds)

    @classmethod
    def stack(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """One batch of several; shorter texts are padded with zeros at the end.

        Raises:
            DataError: if their references differ in layout.
        """
        names, shared = parts[0].per_sample, parts[0].shared
        for part in parts:
            if not all(torch.equal(part.shared[name], shared[name]) for name in shared):
                raise DataError(
                    "references: must be equal in number and shape within a batch; batch by "
                    "customized_grpo.buckets.layout"
                )
        return cls(
            per_sample={name: _stack([part.per_sample[name] for part in parts]) for name in names},
            shared=shared,
        )


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].dim() == 1:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat(
        [
            torch.cat([t, t.new_zeros(len(t), longest - t.shape[1], *t.shape[2:])], 1)
            for t in tensors
        ]
    )


class Generator(Protocol):
    """A thin adapter over a stock diffusers pipeline; latents have a leading batch axis."""

    transformer: nn.Module
    device: torch.device
    lora_targets: tuple[str, ...]
    """Names of the attention projections that LoRA adapts unless the config says otherwise."""

    def check(self, example: Example) -> None:
        """Raises a DataError if the family cannot take the example, say for its references."""
        ...

    def encode(self, examples: Sequence[Example]) -> Conditioning:
        """Prompts and references -> conditioning ``[len(examples), ...]``, without gradient."""
        ...

    def sigmas(self, num_steps: int, shift: float | None) -> Tensor:
        """Noise levels ``[num_steps + 1]``, 1 -> 0; ``shift`` None: the family's own schedule."""
        ...

    def noise(self, count: int, rng: torch.Generator) -> Tensor:
        """Standard normal latents ``[count, *L]`` float32, drawn on the CPU for reproducibility."""
        ...

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity ``[B, *L]`` at latents ``[B, *L]`` and noise levels ``[B]``."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` float32 in [0, 1]."""
        ...

    def base_policy(self) -> AbstractContextManager[None]:
        """A context in which the model is the untuned one."""
        ...

    def save_weights(self, folder: Path) -> None:
        """Writes what was trained, in the family's stock format."""
        ...

    def load_weights(self, folder: Path) -> None:
        """Loads what ``save_weights`` wrote, through the stock loader."""
        ...


@runtime_checkable
class Guidable(Protocol):
    """A Generator with a guidance that evaluation may choose for itself."""

    def guided(self, scale: float) -> Generator:
        """The same model with another guidance: what trains it, trains both.

        Raises:
            ConfigError: naming the field ``guidance_scale``, if the checkpoint does not take it.
        """
        ...


@runtime_checkable
class Sizable(Generator, Protocol):
    """A Generator whose pictures may have other sizes than it was built for."""

    height: int
    width: int

    def shaped(self, height: int, width: int) -> Sizable:
        """The same model with about as many pixels in the nearest of ``buckets.RATIOS``; of
        ``height`` and ``width`` their ratio alone counts.

        Raises:
            ConfigError: as ``sized``.
        """
        ...

    def sized(self, height: int | None, width: int | None) -> Sizable:
        """The same model with pictures of other pixels; None: as they are. What trains it, trains
        both.

        Raises:
            ConfigError: naming ``height`` or ``width``, if the checkpoint has no such pictures.
        """
        ...


@runtime_checkable
class Keeping(Protocol):
    """A Generator that computes some of what it needs for all steps of a prompt at once."""

    def keeping(self) -> AbstractContextManager[None]:
        """A context in which weights do not change and what depends on no step is kept.

        Where gradients are enabled, some reach the weights at its end, or when ``velocity`` is
        asked for other prompts: each loss has to be passed back before.
        """
        ...


def keeping(generator: Generator) -> AbstractContextManager[None]:
    """See ``Keeping``; of other generators nothing."""
    return generator.keeping() if isinstance(generator, Keeping) else nullcontext()
