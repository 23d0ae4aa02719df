"""A rehearsal: measured on the run itself, and nothing of it stays."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from helpers import ROOT, changed

from customized_grpo.cli.main import main
from customized_grpo.config import RunConfig, dump_config, load_config
from customized_grpo.errors import ResourceError
from customized_grpo.rewards.votes import VotesConfig
from customized_grpo.tools import rehearse as module
from customized_grpo.tools.doctor.machine import Machine, Place
from customized_grpo.tools.doctor.memory import predict
from customized_grpo.tools.estimate.devices import device_called
from customized_grpo.tools.estimate.workload import Workload
from customized_grpo.tools.rehearse import Measured, rehearse

MEASURED = Measured(seconds=30.0, validation=60.0, peak=3.9e9, micro_batch_size=None)


@pytest.fixture(scope="module")
def work() -> Workload:
    """Counts of configs/emoji.yaml."""
    return predict(load_config(ROOT / "configs" / "emoji.yaml"))


def on(monkeypatch: pytest.MonkeyPatch, work: Workload, gigabytes: float) -> None:
    """A machine with one GPU of so much memory; the run has been counted."""
    monkeypatch.setattr(module, "predict", lambda _: work)
    size = int(gigabytes * 1e9)
    gpu = Place(name="NVIDIA GeForce RTX 4090", total=size, free=size)
    ram = Place(name="RAM", total=10**12, free=10**12, is_gpu=False)
    monkeypatch.setattr(module, "look", lambda: Machine(ram=ram, gpus=(gpu,)))


@pytest.mark.slow
def test_a_run_is_rehearsed_and_leaves_a_picture(
    tiny_config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    settings: dict[str, object] = {"validate_every": 50, "num_validation": 2}
    config = changed(tiny_config, evaluation=settings, train={"num_updates": 100})
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert main(["train", str(file), "--rehearse", "--price=2.5"]) == 0
    out, err = capsys.readouterr()
    assert f"next: cgrpo train {file}\n" in err
    for name in ("seconds per update", "peak memory, GB"):
        measured, estimated = re.search(rf"{name} +([\d.]+) +([\d.]+)\n", out).groups()  # pyright: ignore
        assert float(measured) > 0 < float(estimated)
    assert re.search(r"seconds per validation +[\d.]+", out)
    assert "100 updates, 3 validations, " in out
    assert re.search(r"1 device, [\d.]+ at 2.5 an hour", out)
    assert "memory: measured with Python and its libraries, estimated without" in out
    assert "picture: emoji-rehearsal.png" in out
    assert sorted(path.name for path in tmp_path.rglob("*") if path != file) == [
        "emoji-rehearsal.png", "here"
    ]  # fmt: skip


def test_the_whole_run_and_its_price(tiny_config: RunConfig) -> None:
    settings: dict[str, object] = {"validate_every": 20}
    config = changed(tiny_config, evaluation=settings, train={"num_updates": 110})
    text = module._whole_run(config, MEASURED, 2.0)
    # 110 x 30 s and 0, 20, ..., 100, 110: 7 validations of 60 s
    assert "110 updates, 7 validations, 62 min on 1 device, 2.07 at 2 an hour" in text
    assert module._whole_run(tiny_config, MEASURED, None).endswith("; --price gives the cost")


@pytest.mark.parametrize(
    ("gigabytes", "says"),
    [
        (24, "it fits: NVIDIA GeForce RTX 4090 has 24.0 GB"),
        (4, "lower first: --"),
    ],
)
def test_what_is_tight_is_told_what_to_lower_first(
    tiny_config: RunConfig,
    work: Workload,
    monkeypatch: pytest.MonkeyPatch,
    gigabytes: float,
    says: str,
) -> None:
    on(monkeypatch, work, gigabytes)
    monkeypatch.setattr(module, "what_to_lower", lambda *_: "--train.micro_batch_size 1")
    lines = module._report(tiny_config, MEASURED, None)
    assert says in lines[-1]
    fitted = dataclasses.replace(MEASURED, micro_batch_size=6)
    assert "--train.micro_batch_size 6" in " ".join(module._report(tiny_config, fitted, None))


def test_what_does_not_fit_says_what_to_lower_first_and_offers_no_resume(
    tiny_config: RunConfig, work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def lower(*values: Any) -> str:
        limits.append(values[-1])
        return "--rollout.batch_size 2"

    def full(config: RunConfig) -> NoReturn:
        Path(config.output_dir, config.name).mkdir(parents=True)
        raise ResourceError("the GPU is out of memory; lower this; `cgrpo resume x` goes on") from (
            torch.OutOfMemoryError("")
        )

    on(monkeypatch, work, 24)
    monkeypatch.setattr(module, "what_to_lower", lower)
    monkeypatch.setattr(module, "train", full)
    with pytest.raises(ResourceError) as caught:
        rehearse(tiny_config, None, tmp_path / "x.png")
    text = str(caught.value)
    assert text == (
        "the GPU is out of memory; lower this; first of all: --rollout.batch_size 2"
    )  # fmt: skip
    assert 0.5 * 24e9 < limits[0] < 0.9 * 24e9
    assert not Path(tiny_config.output_dir).exists()


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Mobile", None),
        ("NVIDIA RTX A6000 with Max-Q Design", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A10", None),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L40S", "l40s"),
        ("Quadro P400", None),
        ("cpu", None),
    ],
)
def test_a_device_is_known_by_what_cuda_calls_it(name: str, device: str | None) -> None:
    found = device_called(name)
    assert (found.name if found else None) == device


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rehearse", "--resume", "auto"], "--resume has no effect with --rehearse"),
        (["--rehearse", "--price", "cheap"], "--price: must be of one device for one hour, a numb"),
        (["--rehearse", "--price"], "argument --price: expected one argument"),
        (["--price", "2"], "--price has no effect without --rehearse"),
        (["--allow-changed"], "--allow-changed has no effect without --resume auto"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "configs/emoji.yaml", *flags]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("identity", "prompt", "says"),
    [
        (0.58, -0.14, "from a prompt weight of about 0.81 on, and the highest is 0.70; raise"),
        (0.4, 0.1, "of about 1.00 on"),  # both reward copies
        (0.3, -0.3, None),  # .70 punishes them
        (0.05, -0.01, None),  # of 192 samples that is nothing
        (None, None, None),  # no masks
    ],
)
def test_whether_copies_are_rewarded(
    identity: float | None, prompt: float | None, says: str | None
) -> None:
    config = load_config(ROOT / "configs" / "emoji.yaml")
    row = {"copying_pays/identity": identity, "copying_pays/prompt": prompt}
    rows = [{name: value for name, value in row.items() if value is not None}, {"loss": 0.0}]
    schedule = {"objectives": ["prompt", "identity"], "weights": [[0.7, 0.3], [0.3, 0.7]]}
    found = module._copying(config, rows, schedule)
    assert says in found[0] if says else not found


@pytest.mark.slow
def test_a_rehearsal_asks_nobody_for_votes(
    tiny_config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By lot, and in its own folder: the run's votes stay as they are."""
    kept = tmp_path / "kept"
    asks = VotesConfig(
        objective="prompt", choice="best-and-worst", min_votes=2, folder=str(kept), patience=1.0
    )
    identity = next(r for r in tiny_config.rewards if r.objective == "identity")
    config = dataclasses.replace(tiny_config, rewards=(identity, asks))
    with caplog.at_level("INFO", "customized_grpo"):
        lines = rehearse(config, None, tmp_path / "x.png")
    assert not kept.exists()
    assert "waiting for votes" not in caplog.text
    (line,) = [line for line in lines if "votes of people" in line]
    assert line.startswith("not rehearsed, drawn by lot: votes: ")
