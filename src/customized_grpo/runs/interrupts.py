"""Ctrl-C and the cluster's SIGTERM: the run stops where it can go on from."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from customized_grpo.errors import Interrupted, everywhere

if TYPE_CHECKING:  # it needs torch, and the command line needs this
    from customized_grpo.runs.ranks import Ranks

_POLL_SECONDS = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ECHO_SECONDS = 5.0  # a cluster signals all processes of a job, torchrun then its own once more


class Interrupts:
    """Inside the context a first signal is only noted, for the checks; a second one exits at once,
    but for the echo of a SIGTERM.

    Outside the main thread, where Python has no signal handlers, it does nothing.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self._ranks = ranks
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = signal.Signals(number), now
        elif number != signal.SIGTERM or now - self._since > _ECHO_SECONDS:
            os._exit(128 + number)

    def check_together(self) -> None:
        """To be called by all processes at one point where nothing is half done.

        Raises:
            Interrupted: in all of them, if a signal has reached any.
        """
        has_come = self.received is not None
        if self._ranks is not None:
            has_come = self._ranks.any(has_come)
        if has_come:
            raise everywhere(Interrupted(self.received or signal.SIGTERM))

    def check_alone(self) -> None:
        """To be called wherever a process that is alone may stop; several stop together only.

        Raises:
            Interrupted: if a signal has come.
        """
        is_alone = self._ranks is None or self._ranks.world_size == 1
        if is_alone and self.received is not None:
            raise Interrupted(self.received)

    def sleep(self, seconds: float) -> None:
        """Waits, until a signal comes at the longest."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and self.received is None:
            time.sleep(min(left, _POLL_SECONDS))
