"""A dataset that is read from its beginning, a block of rows at a time."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import count, islice
from typing import Any

import torch

from customized_grpo.data.listed import Entry, ListedSource, PictureCache, Splits, complete
from customized_grpo.data.splits import scattered
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.types import Example

BLOCK = 256
_Entries = Callable[[Mapping[int, Any], int], Sequence[Entry] | str]


class StreamedSource:
    """A DataSource of rows in the order in which they are stored.

    A block of rows serves as many rollouts as show each of its rows about once, with one of its
    prompts; within it examples are batched and shuffled as in a ``ListedSource``. After the last
    block, which may be shorter, the first comes again. What a rollout shows depends on its number
    alone, so that a resumed run goes on with the same rows: it skips those before.

    Whom a row shows decides, by its name, whether it is trained on.
    """

    def __init__(
        self,
        rows: Any,
        entries: _Entries,
        subject_of: Callable[[Mapping[str, Any], int], str],
        held_out: float,
        seed: int,
    ) -> None:
        self._rows, self._entries, self._subject_of = rows, entries, subject_of
        self._share, self._seed = held_out, seed
        self._next, self._stream = 0, iter(enumerate(rows))
        self._num_blocks: int | None = None
        self.remarks: list[str] = []
        """What was found in the block that was read last."""
        self.prompts: list[str] = []
        """Those of its rows, one each."""
        self._block = lru_cache(maxsize=1)(self._open_block)
        self._kept = lru_cache(self._first)

    def training(self, rollout: int, count: int) -> list[Example]:
        """See the Protocol."""
        block, turn = divmod(rollout, max(1, BLOCK // count))
        return self._block(block).training(turn, count)

    def listed(self) -> Sequence[Example]:
        """See the Protocol: none, as nobody has seen them all."""
        return ()

    def held_out(self, count: int) -> list[Example]:
        """See the Protocol: of the first rows that are held out, one prompt each."""
        return self._kept("held_out", count)

    def validation(self, count: int) -> list[Example]:
        """See the Protocol: likewise."""
        return self._kept("validation", count)

    def _open_block(self, block: int) -> ListedSource:
        """The source of a block, or of the next one with a row to train on."""
        for number in count(block):
            rows = self._read_block(number)
            training = [i for i, row in rows.items() if self._part(row, i) == "training"]
            with ThreadPoolExecutor() as pool:
                read = list(pool.map(partial(self._entries, rows), training))
            found = [some for some in read if not isinstance(some, str)]
            why = Counter(reason for reason in read if isinstance(reason, str))
            used = f"rows {min(rows)} to {max(rows)} of the stream: {len(found)} are trained on"
            self.remarks = [used, *(f"{n} rows not used: {reason}" for reason, n in why.items())]
            if found:
                rng = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
                draws = torch.rand(len(found), generator=rng).tolist()
                chosen = [some[int(u * len(some))] for some, u in zip(found, draws, strict=True)]
                self.prompts = [entry.prompt for entry in chosen]
                return ListedSource(Splits(training=chosen, held_out=()), self._seed + number, "")
            if self._num_blocks is not None and number - block > self._num_blocks:
                break
        raise DataError("streaming: must find a row to train on, got none; lower held_out")

    def _read_block(self, block: int) -> dict[int, Any]:
        """Rows of a block by their numbers."""
        if self._num_blocks is not None:
            block %= self._num_blocks
        follows = block == self._next
        if not follows:
            self._stream = iter(enumerate(self._rows.skip(block * BLOCK), block * BLOCK))
        found = dict(islice(self._stream, BLOCK))
        self._next = block + 1
        if found:
            return found
        rows = block * BLOCK if follows else sum(1 for _ in self._rows)
        self._num_blocks = -(-rows // BLOCK)
        if not rows:
            raise DataError("streaming: must have rows, got none")
        return self._read_block(block)

    def _part(self, row: Mapping[str, Any], index: int) -> str:
        """The split of a row."""
        digest = hashlib.sha256(self._subject_of(row, index).encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        if place < self._share:
            return "held_out"
        return "validation" if place < 2 * self._share else "training"

    def _first(self, part: str, count: int) -> list[Example]:
        cache = PictureCache()
        found = [complete(entry, cache) for entry in islice(self._of(part), count)]
        if not found:
            raise ConfigError(f"held_out: must leave rows for {part}, got none; raise it")
        return found

    def _of(self, part: str) -> Iterator[Entry]:
        for index, row in enumerate(self._rows):
            if self._part(row, index) == part:
                entries = self._entries({index: row}, index)
                if not isinstance(entries, str):
                    yield scattered(entries, lambda entry: entry.id)[0]
