"""Prompts and references are encoded once: what they become is kept, in RAM and maybe on disk."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from customized_grpo.assets import one_line
from customized_grpo.config import CacheConfig, GeneratorConfig, revisions
from customized_grpo.errors import CheckpointError
from customized_grpo.files import write_atomic
from customized_grpo.generators.base import Conditioning, Generator
from customized_grpo.types import Example

_CHECKSUM = "sha256"
_FORMAT = 2  # of what generators make of an example: files of another one are not found


class CachedEncoder:
    """``generator.encode`` that encodes each example once.

    Files are named by a hash of the generator's config, the content of its checkpoints, the prompt
    and the pixels of the references: with any other of these it is another file.
    """

    def __init__(
        self, generator: Generator, identity: GeneratorConfig, config: CacheConfig
    ) -> None:
        self._generator, self._config = generator, config
        self._folder = None if config.folder is None else Path(config.folder)
        known = {"format": _FORMAT, **asdict(identity)}
        if self._folder is not None:  # files outlive the weights; reading those takes a while
            known |= {"checkpoints": revisions(identity)}
        self._identity = json.dumps(known, sort_keys=True)
        self._kept: OrderedDict[str, Conditioning] = OrderedDict()

    def of(self, generator: Generator, identity: GeneratorConfig) -> CachedEncoder:
        """The same for another generator; both together keep as many examples."""
        other = CachedEncoder(generator, identity, self._config)
        other._kept = self._kept
        return other

    def __call__(self, examples: Sequence[Example]) -> Conditioning:
        """Conditioning ``[len(examples), ...]`` of examples of one layout, on the device."""
        keys = [_digest(self._identity, example) for example in examples]
        found: dict[str, Conditioning] = {}
        for key in keys:
            known = self._kept.get(key) or self._load(key)
            if known is not None:
                found[key] = known
        missing = {k: e for k, e in zip(keys, examples, strict=True) if k not in found}
        if missing:  # in one call: encoders that are offloaded come once
            encoded = self._generator.encode(list(missing.values())).to(torch.device("cpu"))
            for row, key in enumerate(missing):
                found[key] = encoded.take(torch.tensor([row]))
                self._save(key, found[key])
        for key, conditioning in found.items():
            self._kept[key] = conditioning
            self._kept.move_to_end(key)
        while len(self._kept) > self._config.num_examples:
            self._kept.popitem(last=False)
        return Conditioning.stack([found[key] for key in keys]).to(self._generator.device)

    def _save(self, key: str, conditioning: Conditioning) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            tensors = conditioning.tensors()
            content = save(tensors, {_CHECKSUM: _checksum(tensors)})
            write_atomic(self._folder / f"{key}.safetensors", content)

    def _load(self, key: str) -> Conditioning | None:
        file = None if self._folder is None else self._folder / f"{key}.safetensors"
        if file is None or not file.exists():
            return None
        refused = one_line(f"{file}: cannot be read (delete it)", CheckpointError)
        with refused, safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if (opened.metadata() or {}).get(_CHECKSUM) != _checksum(tensors):
                raise ValueError("its checksum is missing or wrong")
        return Conditioning.from_tensors(tensors)


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest(identity: str, example: Example) -> str:
    digest = hashlib.sha256(f"{_CHECKSUM}\n{identity}\n{example.prompt}\n".encode())
    for reference in example.references:
        digest.update(str(tuple(reference.shape)).encode())
        digest.update(reference.contiguous().numpy().tobytes())
    return digest.hexdigest()
