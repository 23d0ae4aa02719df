"""What a run does where something goes wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from customized_grpo.config.limits import Count, Seconds
from customized_grpo.config.schedules import UnitInterval


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultConfig:
    """What a run puts up with before it stops, resumable."""

    max_skipped_updates: Count = 3
    """Updates in a row without a finite gradient: each is skipped, so many stop the run."""

    max_lost_rewards: UnitInterval = 0.5
    """Share of a rollout's images that may stay unscored."""

    reward_pauses: tuple[Seconds, ...] = (10.0, 60.0, 300.0)
    """Seconds to wait, one after the other, before more lost images than that are scored again."""

    hacking: Literal["warn", "stop", "best"] = "warn"
    """Where validations show reward hacking or copying of the reference: warn, stop, or end with
    the best checkpoint's weights as the result."""

    hacking_patience: Count = 3
    """Validations in a row that raise an alarm: an evaluator is below its best, and a reward of its
    objective or, unless it is of the identity, the copy gap is above what it was then, each by more
    than noise."""
