"""Plugs that build nothing, by import path `tiny_plugs:...`, and a config file that uses them."""

from dataclasses import dataclass
from typing import Literal

from customized_grpo.config import (
    AlgorithmConfig,
    DataConfig,
    ForwardAlgorithm,
    GeneratorConfig,
    GrpoAlgorithm,
    RewardConfig,
)


@dataclass(frozen=True, kw_only=True)
class TinyGenerator(GeneratorConfig):
    type: Literal["tiny"] = "tiny"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: str
    """Where the weights lie."""
    size: int | None = None
    """Pixels."""

    def build(self):
        raise AssertionError("reading a config must not build anything")


@dataclass(frozen=True, kw_only=True)
class TinyReward(RewardConfig):
    type: Literal["tiny-reward"] = "tiny-reward"  # pyright: ignore
    scale: float = 1.0
    """What the score is multiplied with."""

    def __post_init__(self):
        if self.scale == 0:
            raise ValueError("scale must not be 0, got 0; every image would score the same")

    build = TinyGenerator.build


@dataclass(frozen=True, kw_only=True)
class TinyData(DataConfig):
    type: Literal["tiny-data"] = "tiny-data"  # pyright: ignore

    build = TinyGenerator.build


@dataclass(frozen=True, kw_only=True)
class TinyAlgorithm(GrpoAlgorithm):
    type: str = "tiny-algorithm"

    def losses(self, terms, /):
        return terms.advantage.square() * terms.log_prob, {}


@dataclass(frozen=True, kw_only=True)
class HalfAlgorithm(ForwardAlgorithm):
    type: str = "half"


@dataclass(frozen=True, kw_only=True)
class StrangeAlgorithm(AlgorithmConfig):
    type: str = "strange"

    losses = TinyAlgorithm.losses


@dataclass(frozen=True, kw_only=True)
class NoPlug:
    type: Literal["no-plug"] = "no-plug"


def my_schedule(sigmas):
    return sigmas


YAML = """\
name: test
data: {type: "tiny_plugs:TinyData"}
generator: {type: "tiny_plugs:TinyGenerator", path: here}
rewards:
  - {type: "tiny_plugs:TinyReward", name: face, objective: identity}
  - {type: "tiny_plugs:TinyReward", name: text, objective: prompt}
rollout: {num_steps: 12, num_trained_steps: 7, prompts_per_rollout: 8}
"""
