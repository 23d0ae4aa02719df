"""docs/rewards.md: its examples work, its table is complete."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, import_from

from customized_grpo import registry
from customized_grpo.config import load_config
from customized_grpo.rewards.base import RewardSet
from customized_grpo.types import Example

TEXT = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)
    return found


def config_file(folder: Path, **sections: object) -> Path:
    config = yaml.safe_load((ROOT / "configs" / "emoji.yaml").read_text())
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config | sections))
    return path


def test_a_reward_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(block("python"))
    import_from(tmp_path, monkeypatch)
    own = {"type": "my_rewards:RednessConfig", "objective": "prompt", "strength": 2.0}
    identity = {"type": "dinov2", "objective": "identity", "path": "embedded:reward-dino"}
    config = load_config(config_file(tmp_path, rewards=[own, identity]))
    rewards = RewardSet(config.rewards, torch.device("cpu"))
    assert rewards.names == ("redness", "dinov2")
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.5, 0.5, 0.5]])
    images = colours[:, :, None, None].expand(3, 3, 64, 64)
    example = Example(id="a", prompt="", references=(images[0],), subject="x")
    scores = rewards.score(images, [example] * 3).scores[:, 0]
    torch.testing.assert_close(scores, torch.tensor([2.0, -1.0, 0.0]))
    assert tomllib.loads(block("toml"))["project"]["entry-points"] == {
        registry.REWARDS: {"redness": own["type"]}
    }


def test_the_mix_is_a_valid_config(tmp_path: Path) -> None:
    """By import path: a type is known by name only where the package was installed since."""
    sections = yaml.safe_load(block("yaml"))
    for section in (*sections["rewards"], *sections["evaluators"]):
        section["type"] = DECLARED[registry.REWARDS][section["type"]]
    config = load_config(config_file(tmp_path, **sections))
    assert [reward.objective for reward in config.rewards] == ["identity"] * 2 + ["prompt"] * 2
    assert config.rewards[0].weight == 2


def test_every_local_reward_is_in_the_table() -> None:
    local = {
        "clip-image", "clip-text", "dino", "dinov2", "dinov3", "hpsv2", "hpsv3", "pickscore",
        "siglip2",
    }  # fmt: skip
    assert local <= set(DECLARED[registry.REWARDS])
    assert local <= set(re.findall(r"^\| `([\w-]+)` \|", TEXT, re.M))


@pytest.mark.parametrize(
    "name", ["dino", "dinov3", "clip-image", "siglip2", "pickscore", "hpsv2", "hpsv3"]
)
def test_declared_types_lead_to_their_classes(name: str) -> None:
    cls = registry.import_object(DECLARED[registry.REWARDS][name])
    assert cls.__dataclass_fields__["type"].default == name
