"""Somebody who votes for red, as `cgrpo vote` does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from customized_grpo.rewards.ballots import Ballots, Group
from customized_grpo.tools.vote.booth import Booth, Choice


def redness(ballots: Ballots, digest: str) -> float:
    """How much redder than green and blue a picture is."""
    pixels = np.asarray(Image.open(ballots.picture(digest)), dtype=float) / 255
    return float(pixels[..., 0].mean() - pixels[..., 1:].mean())


class Voter:
    """Looks every moment and prefers red, as long as ``wants`` says; remembers what it was asked.

    It votes as the page does, and knows nothing of the run but its folder of votes.
    """

    def __init__(self, folder: Path, wants: Callable[[int], bool] = lambda count: True) -> None:
        self.ballots, self.booth, self.wants = Ballots(folder), Booth([folder]), wants
        self.groups: list[Group] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._vote)

    def __enter__(self) -> Voter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _vote(self) -> None:
        while not self._is_over.wait(0.05):
            for group in self.booth.groups("red")["groups"]:
                if self.wants(len(self.groups)):
                    self._choose(group)

    def _choose(self, group: dict[str, Any]) -> None:
        ordered = sorted(group["pictures"], key=lambda digest: redness(self.ballots, digest))
        worst = ordered[0] if group["needs_worst"] else None
        self.booth.cast(Choice(group=group["id"], best=ordered[-1], worst=worst, voter="red"))
        self.groups += [g for g in self.ballots.asked() if g.id == group["id"]]
