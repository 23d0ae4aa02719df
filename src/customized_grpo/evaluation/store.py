"""From pictures to numbers: in fixed chunks, over any number of processes, each computed once.

A chunk is a fixed part of a fixed list, and its file is named by the content of all its pictures,
by what is asked about them and by the model. So the numbers have the same bits whoever computes
them, in one go or after any interruption: a batch of other company would move the last ones.
Pictures are decoded by threads while the model works on those before.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from customized_grpo.assets import one_line
from customized_grpo.errors import CheckpointError
from customized_grpo.evaluation.metrics import Compute, Request
from customized_grpo.files import write_atomic
from customized_grpo.runs.ranks import Ranks

_AHEAD = 2  # chunks that are decoded before they are needed
_LOADERS = 8


@dataclass(frozen=True, kw_only=True)
class Task:
    """Numbers of one model for a list of requests, one row each."""

    compute: Compute
    digest: str
    """Of the model and of what it computes."""
    requests: Sequence[Request]

    def key(self, rows: range) -> str:
        """Name of the file of a chunk."""
        keys = [self.requests[row].key() for row in rows]
        text = json.dumps([self.digest, keys], ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


class FeatureStore:
    """Numbers by content, in files that processes and evaluations may share."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._batch_size = folder, batch_size

    def fill(self, tasks: Sequence[Task], ranks: Ranks) -> None:
        """Computes this process's share of what is missing; all tasks are about the same pictures.

        Raises:
            DataError: if a picture cannot be read.
            RewardError: if one cannot be scored.
        """
        if not tasks:
            return
        mine = self._chunks(len(tasks[0].requests))[ranks.rank :: ranks.size]
        missing = {
            rows: some
            for rows in mine
            if (some := [task for task in tasks if not self._file(task, rows).exists()])
        }
        requests = tasks[0].requests
        for rows, images in _loaded(list(missing), requests):
            for task in missing[rows]:
                values = task.compute(images, [task.requests[row] for row in rows])
                content = save({"values": values.float().cpu().contiguous()})
                write_atomic(self._file(task, rows), content)

    def read(self, task: Task) -> Tensor:
        """All rows of a task that has been filled.

        Raises:
            CheckpointError: if a file is damaged.
        """
        parts = [self._read(self._file(task, rows)) for rows in self._chunks(len(task.requests))]
        return torch.cat(parts)

    def _read(self, file: Path) -> Tensor:
        with one_line(f"{file}: must hold numbers of pictures (delete it)", CheckpointError):
            try:
                return load_file(file)["values"]
            except SafetensorError as error:
                raise ValueError(str(error)) from error

    def _file(self, task: Task, rows: range) -> Path:
        return self._folder / f"{task.key(rows)}.safetensors"

    def _chunks(self, count: int) -> list[range]:
        size = self._batch_size
        return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _loaded(
    chunks: Sequence[range], requests: Sequence[Request]
) -> Iterator[tuple[range, list[Tensor]]]:
    """Chunks with their pictures; the next ones are decoded meanwhile."""
    pool = ThreadPoolExecutor(min(_LOADERS, os.cpu_count() or 1))
    pending: deque = deque()
    try:
        for rows in chunks:
            pending.append((rows, [pool.submit(requests[r].photo.picture.load) for r in rows]))
            if len(pending) > _AHEAD:
                yield _wait(*pending.popleft())
        while pending:
            yield _wait(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _wait(rows: range, futures: Sequence) -> tuple[range, list[Tensor]]:
    return rows, [future.result() for future in futures]
