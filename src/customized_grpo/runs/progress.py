"""What a person sees of work that takes long: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

logger = logging.getLogger("customized_grpo")

LINE_SECONDS = 60.0


def duration(seconds: float) -> str:
    """``42 s``, ``12 min``, ``3.5 h`` or ``2.0 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


@contextmanager
def heartbeat(describe: Callable[[], str], every: float = LINE_SECONDS) -> Iterator[None]:
    """Inside, a line each minute says what goes on, and how long it has."""
    has_ended, started = threading.Event(), time.monotonic()

    def beat() -> None:
        while not has_ended.wait(every):
            logger.info("%s, for %.0f s now", describe(), time.monotonic() - started)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


@contextmanager
def working(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Inside, the yielded function counts what is done of ``total``; said from the start."""
    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            job = bar.add_task(what, total=total)
            yield lambda: bar.advance(job)
        return
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1

    logger.info("%s", what)
    with heartbeat(lambda: f"{what}: {done} of {total}"):
        yield advance
