"""What the fuzz tests share: how many examples, what may come out of one, and how bytes break.

The fast suite runs few examples, ``CGRPO_FUZZ=full`` (``make fuzz``) the numbers named first.
Examples do not differ from run to run.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from customized_grpo.errors import CustomizedGRPOError

T = TypeVar("T")

FULL = os.environ.get("CGRPO_FUZZ") == "full"
COUNTS: Counter[tuple[str, str]] = Counter()
_HANG_SECONDS = 60


class Hang(BaseException):
    """Not an Exception: nothing that is fuzzed may catch it."""


def examples(full: int, fast: int) -> Callable[[T], T]:
    """How many examples a test gets, and two hours for them."""
    chosen = settings(
        max_examples=full if FULL else fast,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: pytest.mark.timeout(7200)(chosen(test))


def refused_or(kind: str, function: Callable[[], T]) -> T | None:
    """What the function returns, or None for an error that the user is told; anything else fails.

    The message has to be of one line, so that the command line shows what tests see.
    """
    result, message = None, "accepted"
    try:
        with _no_hang():
            result = function()
    except CustomizedGRPOError as error:
        message = str(error)
    COUNTS[kind, "refused" if result is None else "accepted"] += 1
    assert message.strip()
    assert "\n" not in message
    return result


@contextmanager
def _no_hang() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"no result after {_HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Payload:
    """What an attacker would put into a pickle: it leaves a mark if it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.mark,)


def planted(mark: Path) -> bytes:
    return pickle.dumps(Payload(mark), protocol=2)


def break_bytes(draw: st.DrawFn, content: bytes, header: int = 64) -> bytes:
    """Truncates, flips, overwrites, doubles or removes a few places, half of them in the header."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        end = min(header, len(data)) if draw(st.booleans()) else len(data)
        place = draw(st.integers(0, max(0, end - 1)))
        length = draw(st.sampled_from([1, 2, 4, 8, 100]))
        match draw(st.sampled_from(["flip", "put", "cut", "double", "drop"])):
            case "flip" if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "put":
                data[place : place + length] = draw(_HOSTILE_BYTES)
            case "cut":
                del data[place:]
            case "double":
                data[place:place] = data[place : place + length]
            case _:
                del data[place : place + length]
    return bytes(data)


_HOSTILE_BYTES = st.sampled_from(
    [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\0", b"\xff"]
    + [(10**9).to_bytes(4, order) for order in ("big", "little")]
    + [(20_000).to_bytes(4, order) for order in ("big", "little")]
) | st.binary(min_size=1, max_size=8)
