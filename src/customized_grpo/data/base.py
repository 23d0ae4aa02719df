"""What a data source is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from customized_grpo.types import Example


class DataSource(Protocol):
    """Examples by position, so that any rollout's data can be had without replaying the others."""

    def training(self, rollout: int, count: int) -> list[Example]:
        """The ``count`` examples of rollout number ``rollout``, all of one layout.

        One layout: as many references each, of the same aspect ratios (``buckets.layout``).
        """
        ...

    def listed(self) -> Sequence[Example]:
        """All examples of a finite source, to check before a run; an endless one lists none.

        Their pictures may be on the meta device: shapes without pixels.
        """
        ...

    def held_out(self, count: int) -> list[Example]:
        """The same ``count`` examples every time, none of whose subjects is trained on."""
        ...

    def validation(self, count: int) -> list[Example]:
        """The same ``count`` examples every time, for choosing a recipe; not the held-out ones."""
        ...
