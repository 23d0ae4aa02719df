"""From pictures to numbers: in fixed chunks, over any number of processes, each computed once.

A chunk is a fixed part of a fixed list, and its file is named by the content of all its pictures,
by what is asked about them and by the model. So the numbers have the same bits whoever computes
them, in one go or after any interruption: a batch of other company would move the last ones.
Pictures are decoded by threads while the model works on those before.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from customized_grpo.assets import one_line
from customized_grpo.devices import process_cores
from customized_grpo.errors import CheckpointError
from customized_grpo.evaluation.metrics import Compute, Query
from customized_grpo.files import write_atomic
from customized_grpo.runs.ranks import Ranks

_AHEAD = 2  # chunks that are decoded before they are needed
_LOADERS = 8


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Numbers of one model for a list of queries, one row each."""

    compute: Compute
    digest: str
    """Names the model and what it computes."""
    queries: Sequence[Query]

    def key(self, rows: range) -> str:
        """Name of the file of a chunk."""
        keys = [self.queries[row].key() for row in rows]
        text = json.dumps([self.digest, keys], ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


class FeatureStore:
    """Numbers by content, in files that processes and evaluations may share."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._batch_size = folder, batch_size

    def fill(self, measurements: Sequence[Measurement], ranks: Ranks) -> None:
        """Computes this process's share of what is missing; all must be about the same pictures.

        Raises:
            DataError: if a picture cannot be read.
            RewardError: if one cannot be scored.
        """
        if not measurements:
            return
        queries = measurements[0].queries
        missing: dict[range, list[Measurement]] = {}
        for rows in self._chunks(len(queries))[ranks.rank :: ranks.world_size]:
            if some := [m for m in measurements if not self._file(m, rows).exists()]:
                missing[rows] = some
        for rows, images in _loaded(list(missing), queries):
            for measurement in missing[rows]:
                values = measurement.compute(images, [measurement.queries[row] for row in rows])
                content = save({"values": values.float().cpu().contiguous()})
                write_atomic(self._file(measurement, rows), content)

    def read(self, measurement: Measurement) -> Tensor:
        """All rows of a measurement that has been filled."""
        chunks = self._chunks(len(measurement.queries))
        return torch.cat([_read(self._file(measurement, rows)) for rows in chunks])

    def _file(self, measurement: Measurement, rows: range) -> Path:
        return self._folder / f"{measurement.key(rows)}.safetensors"

    def _chunks(self, count: int) -> list[range]:
        size = self._batch_size
        return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _read(file: Path) -> Tensor:
    with one_line(f"{file}: must hold numbers of pictures (delete it)", CheckpointError):
        return load_file(file)["values"]


def _loaded(
    chunks: Sequence[range], queries: Sequence[Query]
) -> Iterator[tuple[range, list[Tensor]]]:
    """Chunks with their pictures; the next ones are decoded meanwhile."""
    pending: deque[tuple[range, list[Future[Tensor]]]] = deque()
    pool = ThreadPoolExecutor(min(_LOADERS, process_cores()))
    try:
        for rows in [*chunks, *[None] * _AHEAD]:
            if rows is not None:
                pending.append((rows, [pool.submit(queries[r].photo.picture.load) for r in rows]))
            if pending and (rows is None or len(pending) > _AHEAD):
                first, futures = pending.popleft()
                yield first, [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
