"""Offloaded encoders are copied to the device and never back; copies stand for those on a GPU."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family
from torch import Tensor, nn

from customized_grpo.generators.pipeline import PipelineGenerator


class StandIn:
    """A GPU on the host: what is moved there is a copy, which is known by its address."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, can_pin: bool) -> None:
        self.there: dict[int, Tensor] = {}
        self.pinned: dict[int, Tensor] = {}
        self.moved_back = 0
        self._can_pin, self._to = can_pin, Tensor.to
        monkeypatch.setattr(Tensor, "to", lambda *args, **kwargs: self._move(*args, **kwargs))
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: self._pin(tensor))

    def _move(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        to = {arg.type for arg in args if isinstance(arg, torch.device)}
        if "cuda" in to:
            copy = tensor.detach().clone()
            self.there[copy.data_ptr()] = copy
            return copy
        self.moved_back += "cpu" in to and tensor.data_ptr() in self.there
        return self._to(tensor, *args, **kwargs)

    def _pin(self, tensor: Tensor) -> Tensor:
        if not self._can_pin:
            raise RuntimeError("Cannot access accelerator device when none is available.")
        copy = tensor.detach().clone()
        self.pinned[copy.data_ptr()] = copy
        return copy


def places(module: nn.Module) -> set[int]:
    """Addresses of everything that holds numbers."""
    return {t.data_ptr() for t in (*module.parameters(), *module.buffers()) if t.numel()}


def build(family: Family, folder: Path) -> PipelineGenerator:
    family.build(folder)
    config = dataclasses.replace(family.config(str(folder)), offload=True)
    return config.build(torch.device("cuda"))


@pytest.mark.parametrize("can_pin", [True, False])
@pytest.mark.parametrize("number", [0, 2, 4], ids=lambda number: FAMILIES[number].name)
def test_weights_come_and_are_dropped(
    number: int, can_pin: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = StandIn(monkeypatch, can_pin)
    generator = build(FAMILIES[number], tmp_path)
    assert places(generator.transformer) <= gpu.there.keys()
    groups = [(*generator.text_encoders,), ("vae",)]
    encoders = {name: getattr(generator.pipeline, name) for group in groups for name in group}
    kept = {name: places(module) for name, module in encoders.items()}
    if can_pin:
        assert set().union(*kept.values()) <= gpu.pinned.keys()
    for at_work in groups * 2:
        num_pinned = len(gpu.pinned)
        with suppress(KeyboardInterrupt), generator._at_work(*at_work):
            for name, module in encoders.items():
                there = name in at_work
                assert places(module) <= gpu.there.keys() if there else places(module) == kept[name]
            raise KeyboardInterrupt  # whatever ends the work
        assert {name: places(module) for name, module in encoders.items()} == kept
        assert len(gpu.pinned) == num_pinned
    assert not gpu.moved_back
