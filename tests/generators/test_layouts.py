"""Examples whose references differ in shape: batched by layout, trained and shown together."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from helpers import assert_near
from huggingface_hub import constants
from safetensors.torch import save_file
from toy_world import blocks

from customized_grpo.config import LoraSettings, RunConfig
from customized_grpo.errors import ConfigError
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.generators.lora import attach_lora
from customized_grpo.generators.uno import Uno, UnoConfig
from customized_grpo.training.sampling import FixedSampler
from customized_grpo.types import Example


@pytest.fixture(scope="module")
def uno(tmp_path_factory: pytest.TempPathFactory) -> Flux1Generator:
    (family,) = (f for f in FAMILIES if f.name == "uno")
    folder = tmp_path_factory.mktemp("uno")
    family.build(folder)
    config = family.config(str(folder))
    config = dataclasses.replace(config, height=64, width=64, reference_long_side=64)
    return config.build(torch.device("cpu"))


def shaped(number: int, *shapes: tuple[int, int]) -> Example:
    example = blocks(len(shapes), seed=number)
    references = [
        torch.nn.functional.interpolate(r[None], shape)[0]
        for r, shape in zip(example.references, shapes, strict=True)
    ]
    return dataclasses.replace(example, id=str(number), references=tuple(references))


def test_pictures_do_not_depend_on_the_company(uno: Flux1Generator, tiny_config: RunConfig) -> None:
    config = dataclasses.replace(
        tiny_config, evaluation=dataclasses.replace(tiny_config.evaluation, batch_size=2)
    )
    wide, square, pair = (96, 128), (80, 80), (64, 64)
    examples = [
        shaped(i, *s) for i, s in enumerate([(wide,), (square,), (pair, wide), (wide,), (square,)])
    ]  # fmt: skip
    together = FixedSampler(uno, config, examples)()
    sampler = FixedSampler(uno, config, examples)
    for number, example in enumerate(examples):
        alone = FixedSampler(uno, config, [example])
        alone._noise = sampler._noise[number : number + 1]
        assert_near(together[number], alone()[0])
    assert (together[0] - together[3]).abs().max() > 0.05


@pytest.mark.parametrize(
    ("shape", "count", "size"),
    [((900, 900), 1, (512, 512)), ((900, 900), 2, (320, 320)), ((600, 900), 1, (336, 512)),
     ((900, 600), 1, (512, 336)), ((100, 300), 1, (208, 512))],
)  # fmt: skip
def test_uno_references_have_its_long_side(
    shape: tuple[int, int], count: int, size: tuple[int, int]
) -> None:
    config = UnoConfig(path="x")
    assert config.reference_size(shape, (512, 512), count, 16) == size


def test_references_of_uno_lie_on_the_diagonal(uno: Flux1Generator) -> None:
    ids = uno._positions([(64, 32), (32, 64)])["img_ids"]
    starts = ids[[0, 16, 24]].tolist()
    assert starts == [[0, 0, 0], [0, 4, 4], [0, 8, 6]]
    assert len(ids) == 16 + 8 + 8


def test_the_schedule_of_uno_is_shifted_by_its_own_length(uno: Flux1Generator) -> None:
    """At 512 px mu is about .46, where FLUX.1 has .63."""
    length = Uno().sequence_length((32, 32))
    mu = 0.5 + (length - 256) * (1.15 - 0.5) / (4096 - 256)
    assert mu == pytest.approx(0.459, abs=1e-3)
    uno_mu = uno._mu(4)
    shift = torch.tensor(uno_mu).exp()
    assert_near(uno.sigmas(2, None)[1], shift / (shift + 1), terms=16)


def test_the_lora_of_uno_is_merged_and_another_one_trained_on_top(
    uno: Flux1Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys as published: the first block's picture stream, query, key and value in one."""
    random = torch.Generator().manual_seed(0)
    down, up = (torch.randn(*s, generator=random) for s in ((4, 128), (3 * 128, 4)))
    name = "double_blocks.0.processor.qkv_lora1"
    file = tmp_path / "dit_lora.safetensors"
    save_file({f"{name}.down.weight": down, f"{name}.up.weight": up}, file)
    folder = str(uno.config.path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = dataclasses.replace(uno.config, uno_lora="~/dit_lora.safetensors")
    merged = config.build(torch.device("cpu"))
    before, after = (g.transformer.transformer_blocks[0].attn for g in (uno, merged))
    for number, projection in enumerate(("to_q", "to_k", "to_v")):
        added = up[number * 128 : (number + 1) * 128] @ down
        old, new = (getattr(a, projection).weight for a in (before, after))
        assert_near(new, old + added)
    assert torch.equal(before.add_q_proj.weight, after.add_q_proj.weight)
    attach_lora(merged.transformer, LoraSettings(rank=2), merged.lora_targets)
    assert merged.transformer.active_adapters() == ["default"]
    # By its hub id, of which all is in the cache and nobody can be asked.
    cache = tmp_path / "hub" / "models--owner--uno"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    (cache / "snapshots" / ("a" * 40)).mkdir(parents=True)
    shutil.copy(file, cache / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for is_offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
        by_id = dataclasses.replace(config, uno_lora="owner/uno").build(torch.device("cpu"))
        weight = by_id.transformer.transformer_blocks[0].attn.to_q.weight
        assert torch.equal(weight, after.to_q.weight)
    with pytest.raises(ConfigError, match="quantization: must be null where uno_lora is merged"):
        dataclasses.replace(config, quantization="int8").build(torch.device("cpu"))
    with pytest.raises(ConfigError, match="uno_lora: 'nowhere' cannot be loaded"):
        dataclasses.replace(config, path=folder, uno_lora="nowhere").build(torch.device("cpu"))
