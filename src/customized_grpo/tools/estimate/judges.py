"""What vision-language models are asked over a whole run, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from customized_grpo.rewards.endpoints.rubrics import Question
from customized_grpo.rewards.endpoints.vlm_judge import VlmJudgeConfig
from customized_grpo.tools.estimate.workload import Workload

_PIXELS_PER_TOKEN = 28 * 28  # as Qwen2.5-VL sees pictures; other models differ by a factor of 2
_CHARACTERS_PER_TOKEN = 4
_PROMPT_TOKENS = 64  # the picture's prompt or subject, and what is written around it


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeCount:
    """One judge; what fails is asked about again, which is not counted."""

    label: str
    requests: int
    """Of the whole run: one for each picture, or for each group, and question of the rubric."""
    tokens: int
    """Of a question, pictures included, on average; assumed."""
    cost: float | None
    """At most, in the currency of the config's prices: every answer as long as it may be."""


def count_judges(work: Workload) -> tuple[JudgeCount, ...]:
    """The judges among a run's rewards and among the evaluators that validate it."""
    train, evaluation = work.config.train, work.config.evaluation
    rollouts = math.ceil(train.num_updates / train.inner_updates)
    validated = num_validations(train.num_updates, evaluation.validate_every)
    validated *= evaluation.num_validation
    sampled = work.samples * rollouts
    pictures = sampled + validated  # rewards are watched in validations too
    validated += sampled * (work.config.loss.kl_share < 1)  # evaluators say where the KL holds
    groups = work.config.rollout.prompts_per_rollout * rollouts
    counts = [
        _count(work, judge, groups if judge.is_groupwise else scored)
        for judges, scored in ((work.config.rewards, pictures), (work.config.evaluators, validated))
        for judge in judges
        if isinstance(judge, VlmJudgeConfig) and scored
    ]
    return tuple(counts)


def num_validations(num_updates: int, every: int) -> int:
    """How often a run validates: before the first update, after the last, and in between."""
    return len({0, num_updates, *range(0, num_updates, every)}) if every else 0


def _count(work: Workload, judge: VlmJudgeConfig, times: int) -> JudgeCount:
    """``times``: how often each question of the rubric is asked."""
    rubric = judge.rubric
    requests = times * len(rubric.questions)
    asked = [_question_tokens(work, judge, question) for question in rubric.questions]
    tokens = round(sum(asked) / len(asked))
    cost = None
    if judge.price_prompt is not None and judge.price_completion is not None:
        answer = judge.max_tokens or rubric.max_tokens
        cost = requests * (tokens * judge.price_prompt + answer * judge.price_completion) / 1e6
    return JudgeCount(label=judge.label, requests=requests, tokens=tokens, cost=cost)


def _question_tokens(work: Workload, judge: VlmJudgeConfig, question: Question) -> float:
    height, width = work.size
    scale = min(1.0, judge.max_side / max(height, width))
    picture, photo = height * width * scale**2, judge.max_side**2  # photos are no larger than this
    pixels = {
        "output": picture,
        "outputs": work.config.rollout.group_size * picture,
        "source": photo,
        "references": len(work.tokens.references) * photo,
    }
    seen = sum(pixels.get(place, 0.0) for place in question.places)
    text = len(question.system + question.user) / _CHARACTERS_PER_TOKEN + _PROMPT_TOKENS
    return text + seen / _PIXELS_PER_TOKEN
