"""What vision-language models are asked over a whole run, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from customized_grpo.config import RewardConfig
from customized_grpo.rewards.endpoints.rubrics import RUBRICS
from customized_grpo.rewards.endpoints.vlm_judge import VlmJudgeConfig
from customized_grpo.tools.estimate.workload import Workload

_PIXELS_PER_TOKEN = 28 * 28  # as Qwen2.5-VL sees pictures; other models differ by a factor of 2
_CHARACTERS_PER_TOKEN = 4
_PROMPT_TOKENS = 64  # the picture's prompt or subject, and what is written around it


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeCount:
    """One judge; a picture that fails is asked about again, which is not counted."""

    label: str
    requests: int
    """Of the whole run, one for each picture."""
    tokens: int
    """Of the question, pictures included; assumed."""
    cost: float | None
    """At most, in the currency of the config's prices: every answer as long as it may be."""


def count_judges(work: Workload) -> tuple[JudgeCount, ...]:
    """The judges among a run's rewards and among the evaluators that validate it."""
    config = work.config
    rollouts = math.ceil(config.train.num_updates / config.train.inner_updates)
    judged = work.samples * rollouts
    validated = num_validations(config.train.num_updates, config.evaluation.validate_every)
    validated *= config.evaluation.num_validation
    return (*_counts(work, config.rewards, judged), *_counts(work, config.evaluators, validated))


def num_validations(num_updates: int, every: int) -> int:
    """How often a run validates: before the first update, after the last, and in between."""
    return len({0, num_updates, *range(0, num_updates, every)}) if every else 0


def _counts(work: Workload, judges: Sequence[RewardConfig], requests: int) -> list[JudgeCount]:
    return [
        _count(work, judge, requests)
        for judge in judges
        if isinstance(judge, VlmJudgeConfig) and requests
    ]


def _count(work: Workload, judge: VlmJudgeConfig, requests: int) -> JudgeCount:
    height, width = work.size
    scale = min(1.0, judge.max_side / max(height, width))
    pixels = height * width * scale**2
    if judge.criterion == "identity":  # with the photos, which are no larger than this
        pixels += len(work.tokens.references) * judge.max_side**2
    text = len(RUBRICS[judge.criterion]) / _CHARACTERS_PER_TOKEN + _PROMPT_TOKENS
    tokens = round(text + pixels / _PIXELS_PER_TOKEN)
    cost = None
    if judge.price_prompt is not None and judge.price_completion is not None:
        each = tokens * judge.price_prompt + judge.max_tokens * judge.price_completion
        cost = requests * each / 1e6
    return JudgeCount(label=judge.label, requests=requests, tokens=tokens, cost=cost)
