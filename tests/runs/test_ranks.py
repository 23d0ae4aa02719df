"""Which GPU a process takes, what the processes of a run send each other; torch is stood in for."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from customized_grpo.devices import pick_device
from customized_grpo.runs.checkpoint import TrainingState
from customized_grpo.runs.ranks import Ranks, connected
from customized_grpo.tools.estimate.counting import count

MEGA = 2**20


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The fourth process of a node; what it tells CUDA and the process group."""
    told: list[object] = []
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "3"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: told.append(backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    return told


@pytest.mark.parametrize(("visible", "number"), [(1, 0), (2, 1), (4, 3), (8, 3)])
def test_a_process_takes_a_gpu_that_it_sees(
    chosen: list[object], monkeypatch: pytest.MonkeyPatch, visible: int, number: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    with connected("auto") as ranks:
        assert (ranks.rank, ranks.world_size) == (3, 4)
    assert chosen == [number, "cpu:gloo,cuda:nccl"]


def test_a_run_on_the_cpu_leaves_every_gpu_alone(
    chosen: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("device_count", "current_device", "get_rng_state_all", "set_rng_state"):
        asked = Mock(side_effect=AssertionError(f"CUDA's {name} was called"))
        monkeypatch.setattr(torch.cuda, name, asked)
    with connected("cpu"):
        assert pick_device("cpu") == torch.device("cpu")
    assert chosen == ["gloo"]
    module = torch.nn.Linear(2, 2)
    state = TrainingState(module, torch.optim.SGD(module.parameters()), None)
    state.load(state.tensors())


def test_one_process_gathers_rows_in_their_order() -> None:
    """As several do: what is kept of them in a checkpoint is compared by those that go on."""
    rows = torch.tensor([0, 2, 4, 1, 3])  # by the layout of the examples, for one
    assert Ranks().all_gather(10.0 * rows, [rows]).tolist() == [0, 10, 20, 30, 40]


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
