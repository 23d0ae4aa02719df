"""What plugs say of themselves, above all a stranger's: files, hosts, and keys of caches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from huggingface_hub import constants

from customized_grpo.config import (
    CacheConfig,
    Checkpoint,
    GeneratorConfig,
    Host,
    RewardConfig,
    revisions,
)
from customized_grpo.errors import ConfigError
from customized_grpo.evaluation.metrics import identity_of
from customized_grpo.generators.base import Conditioning
from customized_grpo.generators.cache import CachedEncoder
from customized_grpo.rewards.endpoints.vlm_judge import VlmJudgeConfig
from customized_grpo.rewards.hpsv2 import Hpsv2Config
from customized_grpo.types import Example

EXAMPLE = Example(id="a", prompt="a cat", references=(torch.zeros(3, 8, 8),), subject="cat")


@dataclass(frozen=True, kw_only=True, slots=True)
class StrangersReward(RewardConfig):
    type: Literal["stranger"] = "stranger"  # pyright: ignore[reportIncompatibleVariableOverride]
    weights: str = ""
    parts: tuple[str, ...] = ()
    folder: str | None = None
    mode: Literal["fast", "slow"] = "fast"

    def build(self, device: torch.device) -> Any:
        raise AssertionError("nothing is built")


@dataclass(frozen=True, kw_only=True, slots=True)
class StrangersGenerator(GeneratorConfig):
    type: Literal["stranger"] = "stranger"  # pyright: ignore[reportIncompatibleVariableOverride]
    weights: str

    def build(self, device: torch.device) -> Any:
        raise AssertionError("nothing is built")


@dataclass(frozen=True, kw_only=True, slots=True)
class StrangersJudge(VlmJudgeConfig):
    type: Literal["stranger"] = "stranger"  # pyright: ignore[reportIncompatibleVariableOverride]
    examples: str

    def hosts(self) -> tuple[Host, ...]:
        return (Host(url="http://me:password@here:80/v1", token_env="STRANGERS_TOKEN"),)

    check = RewardConfig.check


def reward(**fields: Any) -> StrangersReward:
    return StrangersReward(objective="prompt", **fields)


def test_text_fields_that_name_something_are_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fast", "prompt", "stranger", "folder"):  # an option, an objective, a type
        (tmp_path / name).mkdir()
    Path("a.pt").write_bytes(b"a")
    found = reward(weights="a.pt", parts=("nowhere", "embedded:reward-dino"), folder="folder")
    assert found.checkpoints() == (
        Checkpoint(field="weights", path="a.pt"),
        Checkpoint(field="parts.1", path="embedded:reward-dino"),
        Checkpoint(field="folder", path="folder"),
    )
    for nothing in ("", "owner/name", "x" * 5000, "a\0b", "just words"):
        assert reward(weights=nothing).checkpoints() == ()


def test_a_hub_id_counts_once_it_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc\n")
    assert revisions(reward(weights="owner/name")) == {"weights": "commit abc"}


def test_known_fields_say_what_they_hold() -> None:
    path, clip = Hpsv2Config(objective="prompt", path="x/y", file="z.pt", clip="v/w").checkpoints()
    assert path == Checkpoint(field="path", path="x/y", kind="model", file="z.pt")
    assert clip == Checkpoint(field="clip", path="v/w", kind="texts")


def key_of_scores(file: Path, _: Path) -> str:
    """In the store of evaluations."""
    return str(identity_of(reward(weights=str(file)), torch.device("cpu")))


def key_of_encodings(file: Path, folder: Path) -> str:
    class Encoder:
        device = torch.device("cpu")

        def encode(self, examples: Any) -> Conditioning:
            return Conditioning(per_sample={"a": torch.zeros(len(examples), 1)}, shared={})

    cache: Any = CachedEncoder(
        Encoder(),  # pyright: ignore[reportArgumentType]
        StrangersGenerator(weights=str(file)),
        CacheConfig(folder=str(folder)),
    )
    before = set(folder.glob("*.safetensors"))
    cache([EXAMPLE])
    (new,) = set(folder.glob("*.safetensors")) - before
    return new.name


def key_of_answers(file: Path, folder: Path) -> str:
    judge = StrangersJudge(
        objective="prompt", base_url="http://here/v1", model="m", criterion="prompt",
        examples=str(file), cache=str(folder / "answers.sqlite"), retries=0,
    ).build(torch.device("cpu"))  # fmt: skip
    seen: list[str] = []
    judge._cache = type("Cache", (), {"get": lambda _, key: seen.append(key) or 1.0})()  # pyright: ignore
    judge.score(torch.zeros(1, 3, 8, 8), [EXAMPLE])
    return seen[0]


@pytest.mark.parametrize("key", [key_of_scores, key_of_encodings, key_of_answers])
def test_other_bytes_in_a_strangers_file_are_another_key(key: Any, tmp_path: Path) -> None:
    file, folder = tmp_path / "weights.bin", tmp_path / "cache"
    folder.mkdir()
    keys = []
    for content in (b"one", b"two"):
        file.write_bytes(content)
        keys.append(key(file, folder))
    assert keys[0] != keys[1]


def test_the_token_of_a_host_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = StrangersJudge(
        objective="prompt", base_url="http://here/v1", model="m", criterion="prompt", examples=""
    )
    monkeypatch.delenv("STRANGERS_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="'STRANGERS_TOKEN' must hold the token of here:80, got"):
        judge.check()
    monkeypatch.setenv("STRANGERS_TOKEN", "x")
    judge.check()
