"""docs/rewards.md: its examples work, its table is complete."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from snippets import blocks

from customized_grpo import registry
from customized_grpo.config import load_config
from customized_grpo.tools.doctor.run import votes
from customized_grpo.tools.estimate.votes import count_votes

TEXT = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]


def config_file(folder: Path, **sections: object) -> Path:
    config = yaml.safe_load((ROOT / "configs" / "emoji.yaml").read_text())
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config | sections))
    return path


def test_the_mix_is_a_valid_config(tmp_path: Path) -> None:
    """By import path: a type is known by name only where the package was installed since."""
    sections = yaml.safe_load(blocks("docs/rewards.md", "yaml")[0])
    for section in (*sections["rewards"], *sections["evaluators"]):
        section["type"] = DECLARED[registry.REWARDS][section["type"]]
    config = load_config(config_file(tmp_path, **sections))
    assert [reward.objective for reward in config.rewards] == ["identity"] * 2 + ["prompt"] * 2
    assert config.rewards[0].weight == 2


def test_votes_are_a_valid_config_of_few_votes(tmp_path: Path) -> None:
    _, text = blocks("docs/rewards.md", "yaml")
    sections = yaml.safe_load(text)
    for section in sections["rewards"]:
        section["type"] = DECLARED[registry.REWARDS][section["type"]]
    config = load_config(config_file(tmp_path, **sections))
    (count,) = count_votes(config)
    assert (count.per_rollout, count.group_size) == (4, 6)
    assert [finding.status for finding in votes(config)] == ["ok"]


def test_every_local_reward_is_in_the_table() -> None:
    local = {
        "clip-image", "clip-text", "dino", "dinov2", "dinov3", "efficientnet-lite", "hpsv2",
        "hpsv3", "pickscore", "siglip2", "votes",
    }  # fmt: skip
    assert local <= set(DECLARED[registry.REWARDS])
    assert local <= set(re.findall(r"^\| `([\w-]+)` \|", TEXT, re.M))


@pytest.mark.parametrize(
    "name",
    [
        "dino",
        "dinov3",
        "clip-image",
        "efficientnet-lite",
        "siglip2",
        "pickscore",
        "hpsv2",
        "hpsv3",
        "votes",
    ],
)
def test_declared_types_lead_to_their_classes(name: str) -> None:
    cls = registry.import_object(DECLARED[registry.REWARDS][name])
    assert cls.__dataclass_fields__["type"].default == name
