"""How identity and prompt share the weight of every denoising step: `advantage.schedule`, and
`advantage.balance`, which corrects it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from customized_grpo.config.limits import Count, GroupSize

UnitInterval = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
ImportPath = Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class TdwSchedule:
    """Time-Aware Dynamic Weighting: high -> low -> final prompt weight along the denoising.

    Positions are steps of the paper's schedule, 0 (noise) to 25 (image); other schedules get the
    weight that belongs to their noise level.
    """

    type: Literal["tdw"] = "tdw"
    """The paper's schedule."""

    high: UnitInterval = 0.7
    """Prompt weight before `start`."""

    low: UnitInterval = 0.3
    """Prompt weight that the descent tends to."""

    start: NonNegativeFloat = 6
    """Where the descent starts, in paper steps."""

    center: NonNegativeFloat = 10
    """Where the descent is half way, in paper steps."""

    slope: PositiveFloat = 0.8
    """Steepness of the descent, per paper step."""

    end: NonNegativeFloat = 22
    """Where the descent ends, in paper steps."""

    final: UnitInterval = 0.5
    """Prompt weight from `end` on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantSchedule:
    """The same weights at every step."""

    type: Literal["constant"] = "constant"
    """Naive GRPO's weighting."""

    prompt: UnitInterval = 0.5
    """Weight of the prompt objective; identity gets the rest (0.5 = the paper's 1:1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSchedule:
    """Prompt weight in a straight line along the denoising."""

    type: Literal["linear"] = "linear"
    """A straight line."""

    high: UnitInterval = 0.7
    """Prompt weight at pure noise."""

    low: UnitInterval = 0.3
    """Prompt weight at the image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CosineSchedule:
    """Prompt weight along half a cosine."""

    type: Literal["cosine"] = "cosine"
    """Half a cosine, flat at both ends."""

    high: UnitInterval = 0.7
    """Prompt weight at pure noise."""

    low: UnitInterval = 0.3
    """Prompt weight at the image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomSchedule:
    """A function of your own: `(sigmas [K]) -> [K, 2]`, columns (identity, prompt)."""

    type: Literal["custom"] = "custom"
    """Your own function."""

    target: ImportPath
    """Its import path, `package.module:function`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSchedule:
    """Each step by what its noise moves, measured once on the model that the run begins with.

    Groups that share everything but the noise of one step: the more of an objective's variance a
    step causes, next to the other steps, the more weight the objective has there.
    """

    type: Literal["measured"] = "measured"
    """As the run measures."""

    num_prompts: Count = 16
    """Training prompts that are measured."""

    num_samples: GroupSize = 4
    """Pictures of one prompt for one step: of all prompts and all steps with noise, that many are
    sampled and scored before the first update."""


ScheduleConfig = Annotated[
    TdwSchedule
    | ConstantSchedule
    | LinearSchedule
    | CosineSchedule
    | MeasuredSchedule
    | CustomSchedule,
    Field(discriminator="type"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceSettings:
    """Weights of the objectives corrected by their gradients (MARBLE, arXiv:2605.06507; MGDA)."""

    method: Literal["mgda", "marble"] = "marble"
    """marble = as if all gradients were equally long (MARBLE, arXiv:2605.06507), mgda = as they
    are, the shorter one counting more (MGDA, arXiv:1810.04650)."""

    every: Count = 10
    """Rollouts between measurements, each of which costs an update's passes per objective."""

    decay: Decay = 0.7
    """Of the average of the factors over measurements; 0 = the last one alone."""
