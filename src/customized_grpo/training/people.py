"""Rewards that ask people: the run waits for their answers, and can be stopped meanwhile."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from customized_grpo.rewards.base import RewardSet
from customized_grpo.runs.interrupts import Interrupts
from customized_grpo.runs.log import RunLog
from customized_grpo.runs.ranks import Ranks
from customized_grpo.types import Example, RewardScores, Rollout

_POLL_SECONDS = 1.0


def with_answers(
    scores: RewardScores,
    rollout: Rollout,
    prompts: Sequence[Example],
    rewards: RewardSet,
    log: RunLog,
    interrupts: Interrupts,
    ranks: Ranks,
) -> RewardScores:
    """The scores with what people say of this process's groups, whom it waits for: until those of
    all processes are answered, or nobody is worth waiting for any more.

    Raises:
        Interrupted: if a signal has come meanwhile.
    """
    if not rewards.people:
        return scores
    with log.timed("votes"):
        while (open_groups := _open_groups(rewards, ranks))[0]:
            log.waits(_waiting(*open_groups, shlex.quote(str(log.folder))))
            interrupts.sleep(_POLL_SECONDS)
            interrupts.check_together()
    log.waits("")
    groups = rollout.group_ids
    examples = [prompts[group] for group in groups.tolist()]
    answers = rewards.only_people().score(rollout.images, examples, groups)
    columns = scores.scores.clone()
    for name, column in zip(answers.names, answers.scores.unbind(1), strict=True):
        columns[:, scores.names.index(name)] = column
    return replace(scores, scores=columns, errors=(*scores.errors, *answers.errors))


def _open_groups(rewards: RewardSet, ranks: Ranks) -> tuple[int, int]:
    """Of all processes: groups that are worth waiting for, and groups that were asked about."""
    counts = [(*people.progress(), people.is_patient()) for people in rewards.people]
    left = sum(asked - answered for answered, asked, is_patient in counts if is_patient)
    return ranks.sum(left), ranks.sum(sum(asked for _, asked, _ in counts))


def _waiting(left: int, asked: int, run: str) -> str:
    return f"waiting for votes: {asked - left} of {asked} groups have theirs; `cgrpo vote {run}`"
