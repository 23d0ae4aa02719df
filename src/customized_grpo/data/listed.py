"""Finite sources: entries whose pictures are decoded on demand, in batches of one layout."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from customized_grpo.buckets import layout
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.types import Example

_CACHE_BYTES = 2**30


class Loadable(Protocol):
    """A picture that is read when it is needed; hashable."""

    @property
    def height(self) -> int:
        """Pixels of what ``load`` returns."""
        ...

    @property
    def width(self) -> int:
        """See height."""
        ...

    def load(self) -> Tensor:
        """Pixels ``[C, height, width]`` float32 in [0, 1]."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """An example before its pictures are read."""

    id: str
    prompt: str
    references: tuple[Loadable, ...]
    subject: str = ""
    """Words for the subject; '' = not known."""
    masks: tuple[Loadable, ...] | None = None
    reference_subjects: tuple[str, ...] = ()
    """See Example."""

    @property
    def layout(self) -> tuple[int, ...]:
        """What the examples of a batch share."""
        return layout((picture.height, picture.width) for picture in self.references)


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """Entries of a source; ``validation`` may be empty."""

    training: Sequence[Entry]
    held_out: Sequence[Entry]
    validation: Sequence[Entry] = ()


class PictureCache:
    """The pictures read last, up to a gigabyte of pixels; examples share their tensors."""

    def __init__(self, capacity: int = _CACHE_BYTES) -> None:
        self._capacity, self._bytes = capacity, 0
        self._pictures: OrderedDict[Loadable, Tensor] = OrderedDict()

    def load(self, picture: Loadable) -> Tensor:
        """Pixels of the picture; not to be changed in place."""
        pixels = self._pictures.pop(picture, None)
        if pixels is None:
            pixels = picture.load()
            self._bytes += pixels.nbytes
        self._pictures[picture] = pixels
        while self._bytes > self._capacity and len(self._pictures) > 1:
            _, oldest = self._pictures.popitem(last=False)
            self._bytes -= oldest.nbytes
        return pixels


class ListedSource:
    """A DataSource: training examples in batches of one layout, each shown as often as any other.

    The examples of a layout follow each other in random order, all of them before one comes again,
    so that a batch may end one such pass and begin the next. Layouts take turns, each in proportion
    to its number of examples: in as many rollouts as there are examples, every example has its turn
    exactly ``count`` times. With one layout that is: every epoch shows every example once.

    ``remarks`` say what lies beside the examples and is not used, a line each.
    """

    def __init__(
        self, splits: Splits, seed: int, how_to_validate: str, remarks: Sequence[str] = ()
    ) -> None:
        self.splits, self._seed, self.remarks = splits, seed, remarks
        self._how_to_validate = how_to_validate
        self._cache = PictureCache()
        groups: dict[tuple[int, ...], list[Entry]] = {}
        for entry in splits.training:
            groups.setdefault(entry.layout, []).append(entry)
        self.layouts = groups
        self._groups = list(groups.values())
        self._turns = lru_cache(maxsize=2)(self._shuffle_turns)
        self._order = lru_cache(maxsize=2 * len(groups))(self._shuffle)

    def training(self, rollout: int, count: int) -> list[Example]:
        """See the Protocol."""
        cycle, place = divmod(rollout, len(self.splits.training))
        group, turn = self._turns(cycle)[place].tolist()
        entries = self._groups[group]
        first = (cycle * len(entries) + turn) * count
        positions = (divmod(first + i, len(entries)) for i in range(count))
        chosen = [entries[self._order(group, epoch)[place]] for epoch, place in positions]
        return [complete(entry, self._cache) for entry in chosen]

    def _shuffle_turns(self, cycle: int) -> Tensor:
        """Group and turn within it of every rollout of a cycle ``[N, 2]``, evenly spread.

        Turn ``i`` of a group of ``n`` lies at ``(i + phase) / n`` of the cycle, with one random
        phase a group: sorted, large groups come often and no group comes in a row.
        """
        rng = torch.Generator().manual_seed(self._seed * 1_000_003 + cycle)
        sizes = torch.tensor([len(entries) for entries in self._groups])
        group = torch.arange(len(sizes)).repeat_interleave(sizes)
        turn = torch.cat([torch.arange(size) for size in sizes.tolist()])
        phase = torch.rand(len(sizes), generator=rng, dtype=torch.float64)
        order = ((turn + phase[group]) / sizes[group]).argsort(stable=True)
        return torch.stack([group, turn], 1)[order]

    def _shuffle(self, group: int, epoch: int) -> list[int]:
        seed = (self._seed * 1_000_003 + epoch) * 1_009 + group
        rng = torch.Generator().manual_seed(seed)
        return torch.randperm(len(self._groups[group]), generator=rng).tolist()

    def listed(self) -> Sequence[Example]:
        """See the Protocol; pictures are on the meta device."""
        splits = self.splits
        return [outline(e) for e in (*splits.training, *splits.held_out, *splits.validation)]

    def held_out(self, count: int) -> list[Example]:
        """See the Protocol; all of them if there are fewer."""
        return [complete(entry, self._cache) for entry in self.splits.held_out[:count]]

    def validation(self, count: int) -> list[Example]:
        """See the Protocol; all of them if there are fewer.

        Raises:
            ConfigError: if the data have none.
        """
        if not self.splits.validation:
            raise ConfigError(
                f"validation: must have examples in these data, got none; {self._how_to_validate}"
            )
        return [complete(entry, self._cache) for entry in self.splits.validation[:count]]


def complete(entry: Entry, cache: PictureCache) -> Example:
    """The example with its pictures."""
    return replace(
        outline(entry),
        references=tuple(map(cache.load, entry.references)),
        reference_masks=entry.masks and tuple(map(cache.load, entry.masks)),
    )


def outline(entry: Entry) -> Example:
    """The example with pictures on the meta device: shapes without pixels."""
    masks = None
    if entry.masks is not None:
        masks = tuple(_empty(1, p.height, p.width) for p in entry.masks)
    return Example(
        id=entry.id,
        prompt=entry.prompt,
        subject=entry.subject,
        reference_subjects=entry.reference_subjects,
        references=tuple(_empty(3, p.height, p.width) for p in entry.references),
        reference_masks=masks,
    )


@lru_cache(maxsize=64)
def _empty(channels: int, height: int, width: int) -> Tensor:
    return torch.empty(channels, height, width, device="meta")


def check_entries(entries: Sequence[Entry], where: str) -> Sequence[Entry]:
    """Returns entries that a source can use.

    Raises:
        DataError: if there are none, or two have the same id: rewards tell examples by it.
    """
    if not entries:
        raise DataError(f"{where}: must hold at least one example, got none")
    seen: set[str] = set()
    for entry in entries:
        if entry.id in seen:
            raise DataError(f"{where}: id: must be unique, got {entry.id!r} twice; rename one")
        seen.add(entry.id)
    return entries
