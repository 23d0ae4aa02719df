"""Compiled blocks under changing numbers of tokens; a backend that counts is for inductor."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from customized_grpo.config import LoraSettings, RunConfig
from customized_grpo.training import build

LAYOUTS = ((8, 4), (12, 6), (15, 7), (18, 9))  # tokens of picture and text


class Compiled:
    """A tiny FLUX.1 as ``make_trainable`` leaves it, and how often it was compiled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: RunConfig) -> None:
        self.count = 0
        torch._dynamo.reset()
        stock = FluxTransformer2DModel.compile_repeated_blocks
        monkeypatch.setattr(
            FluxTransformer2DModel,
            "compile_repeated_blocks",
            lambda model, **options: stock(model, backend=self._backend, **options),
        )
        self.model = FluxTransformer2DModel(
            in_channels=4, num_layers=0, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
        )  # fmt: skip
        generator: Any = SimpleNamespace(transformer=self.model, lora_targets=("to_q",))
        settings = LoraSettings(rank=2)
        build.make_trainable(generator, dataclasses.replace(config, compile=True, lora=settings))

    def _backend(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.count += 1
        return graph.forward

    def compilations(self, image: int, text: int) -> int:
        """Of a rollout's pass and an update's, which has another batch."""
        before = self.count
        for batch, gradients in ((4, False), (3, True)):
            with torch.set_grad_enabled(gradients):
                output = self.model(
                    hidden_states=torch.randn(batch, image, 4),
                    encoder_hidden_states=torch.randn(batch, text, 8),
                    pooled_projections=torch.randn(batch, 8),
                    timestep=torch.rand(batch),
                    img_ids=torch.zeros(image, 3),
                    txt_ids=torch.zeros(text, 3),
                ).sample
            if gradients:
                output.mean().backward()
        return self.count - before


@pytest.fixture
def warnings() -> Any:
    """Messages of torch and of this package about the limit."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    names, handler = ("torch._dynamo.convert_frame", "customized_grpo"), Keep()
    for name in names:
        logging.getLogger(name).addHandler(handler)
    yield found
    for name in names:
        logging.getLogger(name).removeHandler(handler)


@pytest.mark.slow
def test_further_token_layouts_are_not_compiled_again(
    monkeypatch: pytest.MonkeyPatch, tiny_config: RunConfig, warnings: list[str]
) -> None:
    """Photos of several aspect ratios, texts of several lengths."""
    compiled = Compiled(monkeypatch, tiny_config)
    counts = [compiled.compilations(*layout) for layout in LAYOUTS]
    assert counts[0] > 0
    assert counts[2:] == [0, 0]
    assert not [text for text in warnings if "recompile_limit" in text]  # or they would be eager


@pytest.mark.slow
def test_a_run_that_meets_too_many_shapes_is_told_so_once(
    monkeypatch: pytest.MonkeyPatch, tiny_config: RunConfig, warnings: list[str]
) -> None:
    monkeypatch.setattr(build, "_MAX_VERSIONS", 1)
    compiled = Compiled(monkeypatch, tiny_config)
    for layout in LAYOUTS[:2]:
        compiled.compilations(*layout)
    (told,) = [text for text in warnings if "compile" in text]
    assert told.startswith("compile: the transformer's blocks have met more than 1 kinds of input")
