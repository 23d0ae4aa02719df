"""Several processes, one run: who does which part, and how the parts become one.

Started by ``torchrun`` (or anything that sets its environment variables). Every process draws the
random numbers of the whole rollout and computes its own samples; scores are gathered, so that
advantages are those of whole groups, however a group is split; gradients are summed.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from customized_grpo.errors import ConfigError
from customized_grpo.files import read_number

_BUCKET = 2**26  # bytes of small tensors that are sent in one message
_PATIENCE = timedelta(hours=2)  # the first one validates, judges and writes while the others wait


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """The processes of a run, seen from one of them; methods are called by all of them together."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this one writes logs, pictures and checkpoints."""
        return self.rank == 0

    def split(self, chunks: Sequence[Tensor]) -> list[Tensor]:
        """Rows of every rank, when each of ``chunks`` (int64 rows) is split over all of them.

        Parts of a chunk differ by one row at most; a rank's rows ascend.

        Raises:
            ConfigError: if a chunk has fewer rows than there are ranks.
        """
        for chunk in chunks:
            if len(chunk) < self.world_size:
                raise ConfigError(
                    f"rollout: {len(chunk)} samples per update must be at least one for each of "
                    f"the {self.world_size} processes; raise rollout.prompts_per_rollout or "
                    "group_size"
                )
        parts = [chunk.tensor_split(self.world_size) for chunk in chunks]
        shares = (torch.cat([part[rank] for part in parts]) for rank in range(self.world_size))
        return [share.sort().values for share in shares]

    def all_gather(self, local: Tensor, shares: Sequence[Tensor]) -> Tensor:
        """``[B, ...]`` in the order of the rows, of every rank's own ``[len(share), ...]``."""
        if self.world_size == 1:
            whole = torch.empty_like(local)
            whole[shares[0].to(local.device)] = local
            return whole
        longest = max(len(share) for share in shares)
        padded = local.new_zeros(longest, *local.shape[1:])
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        whole = local.new_empty(sum(map(len, shares)), *local.shape[1:])
        for share, part in zip(shares, parts, strict=True):
            whole[share.to(whole.device)] = part[: len(share)]
        return whole

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, which JSON can hold."""
        if self.world_size == 1:
            return [value]
        texts: list[Any] = [None] * self.world_size
        # torch pickles what it sends: between the processes of one run, and a text only.
        dist.all_gather_object(texts, json.dumps(value))
        return [json.loads(text) for text in texts]

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sums tensors of equal dtype over the ranks, in place.

        Small ones share a message, for which they are copied; never all of them at once.
        """
        if self.world_size > 1:
            for bucket in _buckets(tensors):
                _sum_together(bucket)

    def sum(self, count: int) -> int:
        """Sum over the ranks."""
        return sum(self.all_gather_object(count))

    def any(self, flag: bool) -> bool:
        """Whether it is so on one of them."""
        return any(self.all_gather_object(flag))

    def broadcast(self, value: Any) -> Any:
        """The first one's value, which JSON can hold."""
        return self.all_gather_object(value if self.is_first else None)[0]

    def barrier(self) -> None:
        """Waits until all have come here."""
        self.all_gather_object(None)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of ``_BUCKET`` bytes at most, or of one that is larger."""
    bucket, size = list[Tensor](), 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _sum_together(tensors: list[Tensor]) -> None:
    parts = [tensor.flatten() for tensor in tensors]  # no copy of what is contiguous
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


ALONE = Ranks()
"""The only process."""


@contextmanager
def connected(device: str) -> Iterator[Ranks]:
    """Inside, the processes that the launcher has started are joined; alone without a launcher.

    ``device`` is the config's: on the CPU nothing of CUDA is touched.
    """
    if read_number("WORLD_SIZE", 1) == 1:
        yield ALONE
        return
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        # Some schedulers show each process its own GPU alone, which is then number 0.
        torch.cuda.set_device(read_number("LOCAL_RANK", 0) % torch.cuda.device_count())
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Ranks(rank=dist.get_rank(), world_size=dist.get_world_size())
    finally:
        # Parts of a sharded model that outlived their group have aborted the process at its end.
        gc.collect()
        dist.destroy_process_group()
