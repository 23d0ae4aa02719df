"""What a batch's texts cost: no padding, no mask and no copy that nobody needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor
from toy_world import blocks

from customized_grpo.config import CacheConfig
from customized_grpo.generators.base import Generator
from customized_grpo.generators.cache import CachedEncoder

SHORT = blocks(seed=1, prompt="a dog")
LONG = blocks(seed=2, prompt="a dog in the snow at night, wearing a hat")
CPU = torch.device("cpu")


def build(name: str, folder: Path) -> Generator:
    (family,) = (family for family in FAMILIES if family.name == name)
    family.build(folder)
    return family.config(str(folder)).build(CPU)


@pytest.fixture(params=["qwen-image-edit-plus", "qwen-image-edit-plus, guided"])
def qwen(request: pytest.FixtureRequest, tmp_path: Path) -> Generator:
    return build(request.param, tmp_path)


def seen(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The transformer's arguments from now on, pass by pass."""
    passes: list[dict[str, Any]] = []
    forward = generator.transformer.forward
    monkeypatch.setattr(
        generator.transformer,
        "forward",
        lambda **given: (passes.append(given), forward(**given))[1],
    )
    return passes


@torch.no_grad()
def velocity(generator: Generator, conditioning: Any, rows: list[int]) -> Tensor:
    noise = generator.noise(2, torch.Generator().manual_seed(0))[rows]
    return generator.velocity(noise, torch.full((len(rows),), 0.7), conditioning)


def test_texts_of_one_length_have_no_mask_and_no_padding(
    qwen: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they were encoded with: so a run that was resumed sees the same texts."""
    alone = velocity(qwen, qwen.encode([SHORT]), [0])
    together = CachedEncoder(qwen, qwen.config, CacheConfig())([SHORT, LONG])
    passes = seen(qwen, monkeypatch)
    assert torch.equal(velocity(qwen, together.take(torch.tensor([0])), [0]), alone)
    group = velocity(qwen, together.take(torch.tensor([1, 1])), [0, 0])
    assert torch.equal(group[0], group[1])
    assert [given["encoder_hidden_states_mask"] for given in passes] == [None] * len(passes)


def test_texts_of_two_lengths_are_padded_to_the_longer(
    qwen: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = blocks(prompt=LONG.prompt * 3)
    encoded = qwen.encode([SHORT, LONG, longest])
    passes = seen(qwen, monkeypatch)
    velocity(qwen, encoded.take(torch.tensor([0, 1])), [0, 1])
    given = passes[0]
    mask, length = given["encoder_hidden_states_mask"], given["encoder_hidden_states"].shape[1]
    added = len(LONG.prompt) - len(SHORT.prompt)  # the tiny tokenizer's tokens are letters
    assert mask.sum(1).tolist() == [length - added, length]
    if len(passes) > 1:  # the blank prompt is as long for both
        assert passes[1]["encoder_hidden_states_mask"] is None


def test_lengths_are_waited_for_once_a_batch(
    qwen: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU whatever becomes a number waits for all that was asked before."""
    asked: list[Tensor] = []
    batch = qwen.encode([SHORT, LONG])
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda t: (asked.append(t), tolist(t))[1])
    for _ in range(3):
        velocity(qwen, batch, [0, 1])
    small = [*batch.shared.values(), *(t for t in batch.per_sample.values() if t.dim() == 1)]
    assert len(asked) == len(small)
    assert {id(tensor) for tensor in asked} == {id(tensor) for tensor in small}


def test_the_empty_prompt_of_a_base_model_is_kept_once(tmp_path: Path) -> None:
    base = build("flux2-klein-base", tmp_path / "base")
    distilled = build("flux2-klein", tmp_path / "distilled")

    def size(generator: Generator) -> int:
        return sum(t.numel() for t in generator.encode([SHORT]).tensors().values())

    assert size(base) == size(distilled)


def test_a_base_model_that_trains_unguided_may_be_evaluated_guided(tmp_path: Path) -> None:
    guided: Any = build("flux2-klein-base", tmp_path)
    unguided: Any = replace(guided.config, guidance_scale=1.0).build(CPU)
    batch = guided.encode([SHORT])
    found = velocity(unguided.guided(guided.config.guidance_scale), batch, [0])
    assert torch.equal(found, velocity(guided, batch, [0]))
    assert not torch.equal(found, velocity(unguided, batch, [0]))
