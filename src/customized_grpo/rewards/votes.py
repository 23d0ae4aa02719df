"""Votes of people as a reward; the page on which they vote is `cgrpo vote RUN`."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from customized_grpo.config import Checkpoint, RewardConfig
from customized_grpo.config.limits import Count, FilePath, Seconds
from customized_grpo.errors import RewardError
from customized_grpo.rewards.ballots import Ballots, Group, Vote, best_worst_scores, is_answered
from customized_grpo.types import Example

_QUESTIONS = {
    "identity": "Which picture shows the subject of the reference best?",
    "prompt": "Which picture shows best what the text says?",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class VotesConfig(RewardConfig):
    """People choose between the pictures of a group, by `cgrpo vote RUN`; the run waits for them.

    A picture's score is how often it was the best, less how often the worst, per vote.
    """

    type: Literal["votes"] = "votes"  # pyright: ignore[reportIncompatibleVariableOverride]
    question: str | None = None
    """What people are asked; null = a question that fits the objective."""
    choice: Literal["best", "best-and-worst"] = "best"
    """What a vote names: with the worst too it says more, and takes two clicks."""
    min_votes: Count = 1
    """People who have to vote on each group."""
    patience: Seconds = 86_400.0
    """Seconds that a rollout waits; then what has too few votes counts as not scored."""
    folder: FilePath | None = None
    """Folder of pictures and votes, of this run alone; null = `votes` in the run's folder."""

    @property
    def is_groupwise(self) -> bool:
        """See RewardConfig."""
        return True

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """See Plug: none; a folder of votes is written."""
        return ()

    def place(self, run: Path) -> Path:
        """The folder of pictures and votes of a run."""
        return run / "votes" if self.folder is None else Path(self.folder)

    def build(self, device: torch.device) -> VotesReward:
        """Asks nobody yet."""
        return VotesReward(self)


class VotesReward:
    """See VotesConfig; a `GroupReward`, and one of `People`."""

    def __init__(self, config: VotesConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._ballots: Ballots | None = None
        self._name = ""
        self._asked: dict[str, Group] = {}
        self._deadline = math.inf

    def begin(self, run: Path, rank: int) -> None:
        """See People."""
        self._ballots = Ballots(self._config.place(run))
        self._name = f"{self._config.label}-{rank}"
        if rank == 0:  # what was asked before a break, also by processes that are no more
            self._ballots.forget()

    def score_groups(
        self, groups: Sequence[Tensor], examples: Sequence[Example]
    ) -> Sequence[Tensor]:
        """See GroupReward and People.

        Raises:
            RewardError: if no run has begun.
        """
        ballots, pairs = self._open(), zip(groups, examples, strict=True)
        asked = [self._group(ballots, images, example) for images, example in pairs]
        if not self._asked:
            self._deadline = self._clock() + self._config.patience
        if new := {group.id: group for group in asked if group.id not in self._asked}:
            self._asked |= new
            ballots.ask(self._name, self._asked.values())
        votes = ballots.votes()
        scores = (best_worst_scores(g, votes) for g in asked)
        return [torch.tensor(column, dtype=torch.float32) for column in scores]

    def _open(self) -> Ballots:
        if self._ballots is None:
            raise RewardError("only a run asks people, and none has begun")
        return self._ballots

    def _group(self, ballots: Ballots, images: Tensor, example: Example) -> Group:
        config = self._config
        question = config.question or _QUESTIONS.get(config.objective, "Which picture is best?")
        return ballots.group(
            question=question,
            prompt=example.prompt,
            references=example.references,
            pictures=list(images),
            needs_worst=config.choice == "best-and-worst",
            min_votes=config.min_votes,
        )

    def progress(self) -> tuple[int, int]:
        """See People."""
        votes = self._open().votes() if self._asked else {}
        return sum(is_answered(g, votes) for g in self._asked.values()), len(self._asked)

    def is_patient(self) -> bool:
        """See People."""
        return self._clock() < self._deadline

    def take_errors(self) -> tuple[str, ...]:
        """See PartialFailures: what nobody is waited for any more."""
        answered, asked = self.progress()
        if answered == asked or self.is_patient():
            return ()
        few = f"fewer votes than min_votes = {self._config.min_votes}"
        return (f"{asked - answered} of {asked} groups have {few}",)

    def dismiss(self) -> None:
        """See People."""
        self._asked = {}
        self._open().ask(self._name, ())


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnVotesConfig(VotesConfig):
    """Votes by lot, for a rehearsal: nobody is asked about pictures that are thrown away."""

    @classmethod
    def of(cls, config: VotesConfig) -> DrawnVotesConfig:
        """In place of a run's own, in the folder of the rehearsal."""
        values: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(config)}
        values["folder"] = None
        return cls(**values)

    def build(self, device: torch.device) -> DrawnVotes:
        """See VotesConfig."""
        return DrawnVotes(self)


class DrawnVotes(VotesReward):
    """See DrawnVotesConfig; nothing is ever waited for."""

    def score_groups(
        self, groups: Sequence[Tensor], examples: Sequence[Example]
    ) -> Sequence[Tensor]:
        """See VotesReward."""
        super().score_groups(groups, examples)
        ballots = self._open()
        votes = ballots.votes()
        for group in self._asked.values():
            for number in range(0 if is_answered(group, votes) else group.min_votes):
                ballots.cast(_lot(group, f"lot {number}"))
        return super().score_groups(groups, examples)


def _lot(group: Group, voter: str) -> Vote:
    """By the group's digest, so that two rehearsals are equal."""
    drawn = random.Random(group.id + voter).sample(group.pictures, len(group.pictures))
    return Vote(
        group=group.id,
        prompt=group.prompt,
        pictures=group.pictures,
        best=drawn[0],
        worst=drawn[-1] if group.needs_worst else None,
        voter=voter,
        time="",
    )
