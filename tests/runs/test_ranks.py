"""What the processes of a run send each other; torch's collectives are stood in for."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from customized_grpo.runs.ranks import Ranks
from customized_grpo.tools.estimate.counting import count

MEGA = 2**20


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each message; every rank has what this one has."""
    sent: list[int] = []

    def all_reduce(tensor: torch.Tensor) -> None:
        sent.append(tensor.nbytes)
        tensor.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return sent


def test_summing_gradients_takes_no_second_copy_of_them(messages: list[int]) -> None:
    """One that is large goes as it is, small ones share a message of limited size."""
    gradients = [torch.full((n * MEGA,), float(i)) for i, n in enumerate((40, 1, 2, 13, 3, 3))]
    gradients.append(torch.ones(3, 4).T)  # not contiguous
    peak = count(lambda: Ranks(world_size=2).all_reduce(gradients)).peak
    assert messages == [160 * MEGA, 64 * MEGA, 24 * MEGA + 48]
    assert peak <= 64 * MEGA
    assert [gradient.unique().item() for gradient in gradients] == [0, 2, 4, 6, 8, 10, 2]
