"""Memory: real predictions against memories that are said to be small."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
from helpers import ROOT, changed

from customized_grpo.config import RunConfig, load_config
from customized_grpo.tools.doctor.findings import Finding
from customized_grpo.tools.doctor.machine import Machine, Place
from customized_grpo.tools.doctor.memory import memory, time_on_cpu, what_fits
from customized_grpo.tools.estimate.cost import Cluster, estimate
from customized_grpo.tools.estimate.devices import DEVICES
from customized_grpo.tools.estimate.workload import Workload

CONFIGS = ROOT / "configs"


def place(gigabytes: float, free: float | None = None, is_gpu: bool = True) -> Place:
    free = gigabytes if free is None else free
    total = int(gigabytes * 1e9)
    return Place(name="it", total=total, free=int(free * 1e9), is_gpu=is_gpu)


def gpus(gigabytes: float, count: int = 1) -> Machine:
    return Machine(ram=place(64, is_gpu=False), gpus=(place(gigabytes),) * count)


def look(work: Workload, machine: Machine) -> Finding:
    return memory("memory", work, machine)


SMALL = ["--generator.dtype", "bfloat16", "--rollout.batch_size", "1",
         "--train.micro_batch_size", "1"]  # fmt: skip


@pytest.fixture
def large(emoji: Workload) -> Workload:
    """24 GB of transformer, 6 of text encoders, activations of 12, or 6 with checkpointing."""
    sizes = {"parameters": 12e9, "block": 1e8, "pair_peak": 12e9, "checkpointed_peak": 6e9}
    model = dataclasses.replace(emoji.transformer, **sizes)
    encode = dataclasses.replace(emoji.encode, parameters=3 * 10**9)
    work = dataclasses.replace(emoji, transformer=model, encode=encode)
    return with_flags(work, SMALL)


def with_flags(work: Workload, flags: list[str]) -> Workload:
    return dataclasses.replace(work, config=load_config(CONFIGS / "emoji.yaml", flags))


def flags_of(finding: Finding) -> list[str]:
    return shlex.split(finding.fix.partition(" (")[0])


def predicted(work: Workload, count: int = 1) -> float:
    cluster = Cluster(device=DEVICES["h100"], num_devices=count, fsdp=work.config.fsdp)
    result = estimate(work, cluster)
    return result.memory[result.layout].total


def test_what_fits_is_what_is_estimated(emoji: Workload) -> None:
    finding = look(emoji, gpus(100))
    assert finding.status == "ok"
    assert f"{predicted(emoji) / 1e9:.1f} GB predicted (activations" in finding.found
    assert "it has 100.0 GB, 100.0 GB free" in finding.found


def test_a_memory_that_is_tight(emoji: Workload) -> None:
    needed = predicted(emoji) / 1e9
    finding = look(emoji, gpus(1.05 * needed))
    assert (finding.status, finding.found[-7:]) == ("warning", ": tight")
    assert finding.fix.startswith("--train.micro_batch_size")
    assert predicted(with_flags(emoji, flags_of(finding))) <= 0.9 * 1.05e9 * needed
    in_use = Machine(ram=place(9), gpus=(place(9, free=0.7 * needed),))
    finding = look(emoji, in_use)
    assert finding.status == "warning"
    assert finding.fix.startswith("end what else uses it, or --train.micro_batch_size")


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (gpus(41), {"--generator.gradient_checkpointing"}),
        (gpus(35), {"--generator.gradient_checkpointing", "--generator.offload"}),
        (gpus(30), {"--generator.offload", "--generator.quantization"}),
        (gpus(30, 4), {"--fsdp"}),
    ],
)
def test_the_advice_makes_it_fit(large: Workload, machine: Machine, expected: set[str]) -> None:
    def fits(flags: list[str]) -> bool:
        work = with_flags(large, SMALL + flags)
        count = len(machine.gpus) if work.config.fsdp else 1
        return predicted(work, count) <= 0.9 * machine.gpus[0].total

    finding = look(large, machine)
    assert finding.status == "problem"
    assert "no field makes enough room" in look(large, gpus(4)).fix
    flags = flags_of(finding)
    pairs = [flags[i : i + 2] for i in range(0, len(flags), 2)]
    assert {name for name, _ in pairs} == expected
    assert fits(flags)
    assert ("by `torchrun --nproc_per_node 4`" in finding.fix) == ("--fsdp" in flags)
    for pair in pairs:  # none is superfluous
        assert not fits([word for other in pairs if other != pair for word in other])


def test_quantization_and_fsdp_exclude_each_other(large: Workload) -> None:
    for field, value in (("fsdp", True), ("compile", True)):
        config = dataclasses.replace(large.config, **{field: value})
        finding = look(dataclasses.replace(large, config=config), gpus(16, 2))
        assert finding.status == "problem"
        assert "--fsdp" not in finding.fix
        assert ("--generator.quantization" in finding.fix) == (field == "compile")


def test_a_cpu_is_asked_where_the_config_wants_it(large: Workload) -> None:
    machine = Machine(ram=place(20, is_gpu=False), gpus=(place(80),))
    assert look(large, machine).status == "ok"
    config = dataclasses.replace(large.config, device="cpu")
    finding = look(dataclasses.replace(large, config=config), machine)
    assert finding.status == "problem"
    assert "offload" not in finding.fix
    assert "nf4" not in finding.fix


def test_fsdp_is_counted_over_all_gpus(large: Workload) -> None:
    sharded = with_flags(large, [*SMALL, "--fsdp", "true"])
    finding = look(sharded, gpus(80, 4))
    assert "each of 4 by `torchrun --nproc_per_node 4`" in finding.found
    assert f"{predicted(sharded, 4) / 1e9:.1f} GB predicted" in finding.found
    assert predicted(sharded, 4) < predicted(large)


def test_a_generator_that_cannot_be_counted(tiny_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    unknown = changed(tiny_config, generator={"path": str(tmp_path)})
    finding = what_fits("fits: x", unknown, gpus(80))
    assert finding.status == "warning"
    assert "cannot be counted" in finding.found
    assert finding.fix


def test_a_run_that_takes_a_cpu_for_days_is_sent_to_a_gpu(emoji: Workload) -> None:
    short, long = (
        time_on_cpu(with_flags(emoji, ["--train.num_updates", str(updates)]))
        for updates in (100, 10_000_000)
    )
    assert (short.status, short.fix) == ("ok", "")
    assert " min on this CPU" in short.found
    assert long.status == "warning"
    assert "docs/rented_gpu.md" in long.fix
    assert "days on this CPU" in long.found
