"""When a checkpoint or a grid of sample pictures is due: by updates or by minutes."""

from __future__ import annotations

import time
from collections.abc import Callable

from customized_grpo.runs.ranks import ALONE, Ranks


class Clock:
    """Something comes every so many updates or minutes, whichever is over first; 0: not by these.

    Minutes are counted since it came last, or since the run began, and end before the update that
    would exceed them, if that takes as long as the one before: what is lost is at most so much, or
    one update. The first process reads the time for all, so that all do the same.
    """

    def __init__(
        self,
        updates: int,
        minutes: float,
        ranks: Ranks = ALONE,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._updates, self._seconds, self._ranks, self._now = updates, 60 * minutes, ranks, now
        self._last = self._asked = now()

    def is_due(self, before: int, after: int) -> bool:
        """Whether it is after update ``after``; asked before at ``before``, by all processes."""
        by_updates = bool(self._updates) and after // self._updates != before // self._updates
        if not self._seconds:
            return by_updates
        now = self._now()
        by_minutes = 2 * now - self._asked - self._last > self._seconds
        self._asked = now
        return self._ranks.broadcast(by_minutes) or by_updates

    def restart(self) -> None:
        """It has come."""
        self._last = self._asked = self._now()
