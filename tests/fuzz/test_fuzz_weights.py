"""LoRA files, checkpoints and caches, damaged: loaded as they are, or one line says why."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import Payload, break_bytes, examples, planted, refused_or
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file

from customized_grpo.assets import resolve_checkpoint
from customized_grpo.config import CacheConfig, LoraSettings
from customized_grpo.data.emoji.source import EmojiSource
from customized_grpo.errors import CheckpointError, ConfigError, CustomizedGRPOError
from customized_grpo.files import LORA_FILE
from customized_grpo.generators.base import Conditioning
from customized_grpo.generators.cache import CachedEncoder
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.generators.flux_kontext import FluxKontextConfig
from customized_grpo.generators.lora import attach_lora
from customized_grpo.generators.lora_files import read_lora
from customized_grpo.generators.uno import UnoConfig
from customized_grpo.rewards.attributes import AttributeClassifier
from customized_grpo.rewards.clip_text import ClipTextConfig
from customized_grpo.rewards.dinov2 import Dinov2Config
from customized_grpo.rewards.endpoints.answer_cache import AnswerCache
from customized_grpo.rewards.loading import load_tokenizer

CPU = torch.device("cpu")
GENERATOR = FluxKontextConfig(path="embedded:generator")
DTYPES = [torch.int64, torch.float16, torch.float64, torch.bfloat16, torch.uint8, torch.bool]
NUMBERS = [0, -1, 1, 2, 3, 7, 2.5, 10**9, 10**30, None, True, "x", [], {}, [1, 2], float("nan")]
HEADERS = [0, 1, 10**6, 10**9, 2**31, 2**63 - 1, 2**64 - 1]


def build() -> Flux1Generator:
    return GENERATOR.build(CPU)


@st.composite
def damaged_tensors(draw: st.DrawFn, content: bytes, metadata: dict[str, str]) -> bytes:
    """A safetensors file with another tensor, header, length or byte."""
    how = draw(st.sampled_from(["tensor", "tensor", "bytes", "length", "metadata", "other"]))
    if how == "bytes":
        return break_bytes(draw, content, 4000)
    if how == "length":
        return draw(st.sampled_from(HEADERS)).to_bytes(8, "little") + content[8:]
    if how == "metadata":
        key = draw(st.sampled_from(sorted(metadata)))
        return save(load(content), metadata | {key: draw(st.sampled_from(["", "{", "{}", "[1]"]))})
    if how == "other":
        return draw(
            st.sampled_from([b"", b"\x80\x02}.", b"PK\x03\x04", content[: len(content) // 2]])
        )
    tensors = load(content)
    name = draw(st.sampled_from(sorted(tensors)))
    tensors |= {name: change_tensor(draw, tensors[name])}
    match draw(st.sampled_from(["", "", "missing", "extra", "renamed"])):
        case "missing":
            del tensors[name]
        case "extra":
            tensors["more.weight"] = torch.ones(3, 3)
        case "renamed":
            tensors[f"x.{name}"] = tensors.pop(name)
    return save({n: t.contiguous() for n, t in tensors.items()}, metadata)


def change_tensor(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    match draw(st.sampled_from(["value", "shape", "dtype", "empty", "scalar", "grown", "same"])):
        case "value":
            changed = tensor.clone()
            bad = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30]))
            if changed.is_floating_point():
                changed.view(-1)[draw(st.integers(0, changed.numel() - 1))] = bad
            return changed
        case "shape":
            return tensor.T if tensor.dim() == 2 else tensor[None]
        case "dtype":
            return tensor.to(draw(st.sampled_from(DTYPES)))
        case "empty":
            return tensor.new_zeros(0)
        case "scalar":
            return tensor.new_ones(())
        case "grown":
            return torch.cat([tensor, tensor]) if tensor.dim() else tensor
        case _:
            return tensor


@st.composite
def damaged_json(draw: st.DrawFn, text: str) -> bytes:
    """A JSON file with another value somewhere, or of broken bytes."""
    if draw(st.integers(0, 3)) == 0:
        return break_bytes(draw, text.encode())
    content: Any = json.loads(text)
    node, key = draw(st.sampled_from(places(content)))
    if draw(st.integers(0, 3)) == 0:
        del node[key]
    else:
        node[key] = draw(st.sampled_from(NUMBERS))
    return json.dumps(content).encode()


def places(node: Any) -> list[tuple[Any, Any]]:
    if not isinstance(node, (dict, list)):
        return []
    keys = list(node) if isinstance(node, dict) else range(len(node))
    return [(node, key) for key in keys] + [p for key in keys for p in places(node[key])]


def copy_linked(source: Path, target: Path) -> Path:
    """A copy whose files may be replaced, but not written into."""
    shutil.copytree(source, target, copy_function=os.symlink)
    return target


def replace(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


@pytest.fixture(scope="module")
def generator() -> Flux1Generator:
    return build()


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    generator = build()
    attach_lora(generator.transformer, LoraSettings(rank=2, alpha=3.0), ("to_q", "to_k"))
    generator.save_weights(folder)
    return folder / LORA_FILE


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def loaded_lora(generator: Flux1Generator, folder: Path) -> dict[str, torch.Tensor]:
    """What is in the transformer afterwards; it is plain again then."""
    from peft import get_peft_model_state_dict

    try:
        generator.load_weights(folder)
        name = list(generator.pipeline.transformer.peft_config)[-1]
        return get_peft_model_state_dict(generator.pipeline.transformer, adapter_name=name)
    finally:
        generator.pipeline.unload_lora_weights()


@given(data=st.data())
@examples(full=250, fast=15)
def test_lora_files(
    generator: Flux1Generator,
    lora: Path,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    content = data.draw(damaged_tensors(lora.read_bytes(), metadata_of(lora)))
    (folder / LORA_FILE).write_bytes(content)
    loaded = refused_or("weights", lambda: loaded_lora(generator, folder))
    if loaded is not None:
        written = load(content)
        assert {f"transformer.{name}" for name in loaded} == written.keys()
        for name, tensor in loaded.items():
            assert torch.equal(tensor, written[f"transformer.{name}"].float())
    assert os.listdir(folder) == [LORA_FILE]
    shutil.rmtree(folder)


REWARDS: dict[str, Callable[[str], Any]] = {
    "reward-clip": lambda path: ClipTextConfig(path=path, objective="prompt").build(CPU),
    "reward-dino": lambda path: Dinov2Config(path=path, objective="identity").build(CPU),
    "evaluator-attributes": lambda path: AttributeClassifier.load(path, CPU),
}


def load_and_use(name: str, path: str) -> Any:
    """A checkpoint that loads has to work too."""
    reward = REWARDS[name](path)
    use = reward.hits if name == "evaluator-attributes" else reward.score
    return use(torch.rand(1, 3, 64, 64), TASK)


@given(data=st.data(), name=st.sampled_from(sorted(REWARDS)))
@examples(full=250, fast=15)
def test_reward_checkpoints(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str
) -> None:
    folder = tmp_path_factory.mktemp("reward") / name
    copy_linked(Path(resolve_checkpoint(f"embedded:{name}")), folder)
    damage(data, folder)
    refused_or("weights", lambda: load_and_use(name, str(folder)))
    shutil.rmtree(folder.parent)


def damage(data: st.DataObject, folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".txt"))
    file = data.draw(st.sampled_from(files), label="file")
    content = file.read_bytes()
    match file.suffix:
        case ".safetensors":
            replace(file, data.draw(damaged_tensors(content, {"format": "pt"})))
        case ".json":
            replace(file, data.draw(damaged_json(content.decode())))
        case _:
            replace(file, break_bytes(data.draw, content))  # pyright: ignore


@given(data=st.data())
@examples(full=80, fast=2)
def test_generator_checkpoints(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("generator") / "copy"
    copy_linked(Path(resolve_checkpoint(GENERATOR.path)), folder)
    damage(data, folder)
    refused_or("weights", lambda: build_and_use(str(folder)))
    shutil.rmtree(folder.parent)


def build_and_use(path: str) -> torch.Tensor:
    generator = FluxKontextConfig(path=path).build(CPU)
    latents = generator.noise(1, torch.Generator())
    sigma = generator.sigmas(4, None)[:1]
    return generator.decode(generator.velocity(latents, sigma, generator.encode(TASK)))


class Fixed:
    """Stands for a generator that encodes everything to the same."""

    device = CPU

    def encode(self, examples: list) -> Conditioning:
        per_sample = {"states": torch.ones(len(examples), 3, 2), "pooled": torch.ones(1, 4)}
        return Conditioning(per_sample=per_sample, shared={"ids": torch.arange(3)})


TASK = EmojiSource(seed=0).training(0, 1)


def cached(folder: Path) -> Conditioning:
    encode = CachedEncoder(Fixed(), GENERATOR, CacheConfig(folder=str(folder)))  # pyright: ignore
    return encode(TASK)


@given(data=st.data())
@examples(full=150, fast=15)
def test_cache_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cached(folder)
    (file,) = folder.iterdir()
    content = data.draw(damaged_tensors(file.read_bytes(), metadata_of(file)))
    file.write_bytes(content)
    found = refused_or("weights", lambda: cached(folder))
    if found is not None:
        assert torch.equal(found.per_sample["states"], torch.ones(1, 3, 2))
        assert torch.equal(found.shared["ids"], torch.arange(3))
    assert list(folder.iterdir()) == [file]
    shutil.rmtree(folder)


@given(data=st.data())
@examples(full=50, fast=3)
def test_answer_caches(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = tmp_path_factory.mktemp("answers") / "cache.sqlite"
    AnswerCache(str(file)).put("key", 2.0)
    content = break_bytes(data.draw, file.read_bytes(), 100)  # pyright: ignore
    file.write_bytes(content)

    def read() -> float:
        return AnswerCache(str(file)).get("key") or 0.0

    refused_or("weights", read)


# What the fuzzing found, and what may never come back.


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Made by a payload that is read; torch's reader of pickles must not even be tried."""
    tried: list[object] = []
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: tried.append(arguments))
    yield tmp_path / "mark"
    assert not tried
    assert not (tmp_path / "mark").exists()


PICKLES = ("diffusion_pytorch_model.bin", "pytorch_model.bin", "adapter_model.bin")


def plant(folder: Path, mark: Path, keep_safetensors: bool) -> None:
    """A pickle beside the weights, or in their place under both names."""
    for file in list(folder.rglob("*.safetensors")):
        for name in PICKLES:
            (file.parent / name).write_bytes(planted(mark))
        if not keep_safetensors:
            replace(file, planted(mark))


def test_a_pickle_planted_as_a_checkpoint_is_refused_unread(tmp_path: Path, mark: Path) -> None:
    for name, load_reward in REWARDS.items():
        folder = copy_linked(Path(resolve_checkpoint(f"embedded:{name}")), tmp_path / name)
        plant(folder, mark, keep_safetensors=False)
        with pytest.raises(ConfigError, match=f"{name}' is not a "):
            load_reward(str(folder))
        (folder / "model.safetensors").unlink()  # now there is the pickle only
        with pytest.raises(
            ConfigError, match=f"{name}' is not a .*no file named model.safetensors"
        ):
            load_reward(str(folder))
    folder = copy_linked(Path(resolve_checkpoint(GENERATOR.path)), tmp_path / "generator")
    plant(folder, mark, keep_safetensors=False)
    with pytest.raises(ConfigError, match="cannot be loaded as a checkpoint"):
        FluxKontextConfig(path=str(folder)).build(CPU)
    for file in list(folder.rglob("*.safetensors")):
        file.unlink()
    with pytest.raises(ConfigError, match="cannot be loaded as a checkpoint"):
        FluxKontextConfig(path=str(folder)).build(CPU)


def test_a_pickle_planted_as_trained_weights_is_refused_unread(
    generator: Flux1Generator, tmp_path: Path, mark: Path
) -> None:
    (tmp_path / LORA_FILE).write_bytes(planted(mark))
    for name in ("pytorch_lora_weights.bin", *PICKLES):
        torch.save(Payload(mark), tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be loaded as a LoRA"):
        generator.load_weights(tmp_path)
    (tmp_path / LORA_FILE).unlink()
    config = Path(resolve_checkpoint(GENERATOR.path)) / "transformer" / "config.json"
    (tmp_path / "transformer").mkdir()
    shutil.copy(config, tmp_path / "transformer")
    torch.save(Payload(mark), tmp_path / "transformer" / PICKLES[0])
    with pytest.raises(CheckpointError, match="cannot be loaded as the weights of a run"):
        generator.load_weights(tmp_path)
    with pytest.raises(ConfigError, match=r"uno_lora: .* cannot be loaded as a LoRA"):
        UnoConfig(path=GENERATOR.path, uno_lora=str(tmp_path)).build(CPU)


def test_a_pickle_planted_as_a_cache_is_refused_unread(tmp_path: Path, mark: Path) -> None:
    cached(tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(planted(mark))
    with pytest.raises(CheckpointError, match="cannot be read"):
        cached(tmp_path / "cache")
    (tmp_path / "answers.sqlite").write_bytes(planted(mark) * 100)
    with pytest.raises(ConfigError, match="cache: must be a writable sqlite file"):
        AnswerCache(str(tmp_path / "answers.sqlite"))


def test_code_beside_a_checkpoint_is_not_run(tmp_path: Path, mark: Path) -> None:
    """transformers would ask on the terminal whether to run a tokenizer's own code."""
    code = f"open({str(mark)!r}, 'w').close()\n"
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(code)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_tokenizer(str(folder))
    folder = copy_linked(Path(resolve_checkpoint(GENERATOR.path)), tmp_path / "generator")
    index = json.loads((folder / "model_index.json").read_text())
    replace(folder / "model_index.json", json.dumps(index | {"vae": ["evil", "Evil"]}).encode())
    (folder / "vae" / "evil.py").write_text(code)
    with pytest.raises(ConfigError, match="cannot be loaded as a checkpoint"):
        FluxKontextConfig(path=str(folder)).build(CPU)


def save_changed(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors, metadata = load_file(file), metadata_of(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata)


FIRST = "transformer.transformer_blocks.0.attn.to_k.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t[FIRST].fill_(torch.nan), f"'{FIRST}' must be finite, got NaN or infinity"),
        (lambda t: t.pop(FIRST), r"lora_A must be there, it is missing"),
        (
            lambda t: t.update({"transformer.more.lora_A.weight": torch.ones(2, 2)}),
            "more.lora_B must",
        ),
        (lambda t: t.update({FIRST: torch.ones(2, 5)}), "must map 256 features to 256, got 5"),
        (lambda t: t.clear(), "must hold tensors, there are none"),
    ],
    ids=["nan", "missing", "surplus", "shape", "empty"],
)
def test_a_lora_must_fit(
    generator: Flux1Generator, lora: Path, tmp_path: Path, change: Any, expected: str
) -> None:
    shutil.copy(lora, tmp_path)
    save_changed(tmp_path / LORA_FILE, change)
    with pytest.raises(CheckpointError, match=expected):
        loaded_lora(generator, tmp_path)


def test_a_lora_without_its_alpha_is_loaded_as_diffusers_does_with_a_warning(
    generator: Flux1Generator, lora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(load_file(lora), tmp_path / LORA_FILE, {"format": "pt"})
    (pair, *_) = read_lora(tmp_path, generator.transformer).values()
    assert pair.alpha == pair.rank == 2
    assert "says no alpha; taken as the rank" in caplog.text
    caplog.clear()
    (pair, *_) = read_lora(lora, generator.transformer).values()
    assert (pair.alpha, pair.rank, caplog.text) == (3, 2, "")


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("how", ["missing", "nan"])
def test_weights_of_a_generator_that_are_missing_or_nan_are_named(
    tmp_path: Path, part: str, how: str
) -> None:
    """The libraries would fill what is missing at random, with a warning."""
    folder = copy_linked(Path(resolve_checkpoint(GENERATOR.path)), tmp_path / "generator")
    (file,) = (folder / part).glob("*.safetensors")
    name = sorted(load_file(file))[3]
    change = dict.pop if how == "missing" else lambda t, n: t[n].view(-1)[:1].fill_(torch.nan)
    save_changed(file, lambda tensors: change(tensors, name))
    text = "it is missing" if how == "missing" else "must be finite"
    with pytest.raises(ConfigError, match=rf"{part}: .*'{name}'.*{text}"):
        FluxKontextConfig(path=str(folder)).build(CPU)


def test_nan_in_a_reward_is_named(tmp_path: Path) -> None:
    folder = copy_linked(Path(resolve_checkpoint("embedded:reward-dino")), tmp_path / "dino")
    save_changed(folder / "model.safetensors", lambda t: t["layernorm.bias"].fill_(torch.nan))
    with pytest.raises(ConfigError, match=r"path: .*dino': 'layernorm.bias' must be finite"):
        REWARDS["reward-dino"](str(folder))


def test_numbers_of_a_config_that_would_never_end_are_refused(tmp_path: Path) -> None:
    folder = copy_linked(Path(resolve_checkpoint("embedded:reward-dino")), tmp_path / "dino")
    config = json.loads((folder / "config.json").read_text())
    for key, limit in (("num_hidden_layers", "1,000"), ("hidden_size", "100,000,000")):
        replace(folder / "config.json", json.dumps(config | {key: 10**9}).encode())
        with pytest.raises(ConfigError, match=f"{key} must be at most {limit}, got 1000000000"):
            REWARDS["reward-dino"](str(folder))


@pytest.mark.parametrize("path", ["a\0b", "~nobody-here/x", "x" * 5000, "embedded:../assets", ""])
def test_a_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(CustomizedGRPOError, match="path: "):
        FluxKontextConfig(path=path).build(CPU)


def test_an_answer_cache_with_other_values_gives_none(tmp_path: Path) -> None:
    file = tmp_path / "cache.sqlite"
    cache = AnswerCache(str(file))
    cache.put("good", 2.0)
    with sqlite3.connect(file) as opened:
        rows = [("text", "x"), ("bytes", b"\x80\x02."), ("infinite", float("inf"))]
        opened.executemany("INSERT INTO answers VALUES (?, ?)", rows)
    assert cache.get("good") == 2.0
    assert [cache.get(name) for name, _ in rows] == [None] * 3
