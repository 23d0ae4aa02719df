"""The benchmarks run, and count what they say."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from chaos import small_run
from helpers import ROOT, changed

from customized_grpo.config import dump_config, load_config


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_medians_leave_out_the_first_iteration(benchmark) -> None:
    rows = [{"update": 0, "seconds/validation": 1.0}]
    for number, (rollout, update) in enumerate([(99, 99), (4, 1), (5, 7), (9, 2)]):
        rows.append({"update": 2 * number + 1, "seconds/rollout": rollout, "seconds/update": 1})
        rows.append({"update": 2 * number + 2, "seconds/update": update})
    seconds = benchmark("_iterations").medians(rows, 2)
    assert seconds == {"data": 0, "rollout": 5, "reward": 0, "update": 3, "iteration": 12}


def test_the_naive_structure_does_the_same_work(benchmark) -> None:
    config = load_config(ROOT / "configs" / "emoji.yaml")
    naive = benchmark("mfu")._naive(config)
    assert (naive.rollout.batch_size, naive.train.micro_batch_size) == (1, 1)
    for name in ("num_steps", "num_trained_steps", "group_size", "prompts_per_rollout"):
        assert getattr(naive.rollout, name) == getattr(config.rollout, name)
    assert (naive.generator, naive.lora, naive.rewards) == (
        config.generator, config.lora, config.rewards
    )  # fmt: skip


def test_predictions_are_relative_to_the_reference_point(benchmark) -> None:
    seconds = {"data": 1.0, "rollout": 2.0, "reward": 1.0, "update": 4.0, "iteration": 8.0}
    flops = dict.fromkeys(("data", "rollout", "reward", "update"), 10.0)
    base = (seconds, flops)
    point = ({**seconds, "update": 6.0, "iteration": 10.0}, {**flops, "update": 30.0})
    ratios = benchmark("scaling").compare(point, base)
    assert ratios == {"rollout": 1.0, "update": 2.0, "all": 1.6}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("flags", [[], ["--fsdp"]])
def test_processes_ends_with_a_ratio(
    benchmark, tmp_path: Path, monkeypatch, capsys, flags: list[str]
) -> None:
    file = tmp_path / "small.yaml"
    # Two updates of two processes: with fsdp each takes a whole group of either.
    config = changed(small_run(tmp_path, "small", 4), rollout={"prompts_per_rollout": 4})
    file.write_text(dump_config(config))
    words = ["processes.py", "--config", str(file), "--repeats", "1", "--json", *flags]
    monkeypatch.setattr(sys, "argv", words)
    benchmark("processes").main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    seconds = result["one_seconds"]["iteration"], result["seconds"]["iteration"]
    assert result["throughput_ratio"] == seconds[0] / seconds[1] > 0
    assert (result["processes"], result["fsdp"]) == (2, bool(flags))


def test_points_of_the_curves_are_configs(benchmark) -> None:
    scaling, predicted = benchmark("scaling"), benchmark("predicted")
    emoji = ROOT / "configs" / "emoji.yaml"
    for curve, values in scaling.CURVES.items():
        config = load_config(emoji, scaling.REFERENCE + scaling.flags(curve, values[-1]))
    config = scaling.with_references(config, 2)
    assert config.generator.type == "uno"
    assert len(config.data.build(0).training(0, 1)[0].references) == 2
    for flags, values in predicted.CURVES.values():
        overrides = predicted.REFERENCE + flags.format(*values[-1]).split()
        load_config(predicted.CONFIGS / "flux-kontext.yaml", overrides)


@pytest.mark.long
@pytest.mark.slow
def test_mfu_ends_with_its_numbers(
    benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    text = (ROOT / "configs" / "emoji.yaml").read_text()
    text = text.replace("group_size: 12", "group_size: 2").replace("_rollout: 8", "_rollout: 2")
    (tmp_path / "small.yaml").write_text(text)
    threads = str(torch.get_num_threads())
    flags = ["--config", str(tmp_path / "small.yaml"), "--threads", threads, "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["mfu.py", *flags, "--json"])
    mfu: ModuleType = benchmark("mfu")
    mfu.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    peak, seconds = result["peak_flops_per_second"], result["seconds"]
    assert (result["images"], result["pairs"]) == (4, 20)
    assert result["update_mfu"] == result["flops"]["update"] / seconds["update"] / peak
    assert result["rollout_mfu"] == result["flops"]["rollout"] / seconds["rollout"] / peak
    naive = result["naive_seconds"]["iteration"]
    assert result["speedup_vs_naive"] == naive / seconds["iteration"]
    assert result["peak_memory_bytes"] > 1e8


@pytest.mark.long
@pytest.mark.slow
def test_evaluation_ends_with_its_numbers(
    benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = benchmark("evaluation")
    monkeypatch.setattr(evaluation, "PHOTOS", 1)
    result = evaluation.measure(tmp_path, 30, 8, "cpu")
    assert (result["outputs"], result["pictures"]) == (30, 30 + 30)
    whole, alone = result["pictures_per_second"], result["encoder_pictures_per_second"]
    assert result["share_of_encoder_rate"] == pytest.approx(whole / alone)
    assert result["encoder_mfu"] * result["share_of_encoder_rate"] == pytest.approx(result["mfu"])
    tokens, width, layers = 197, 384, 12  # products of weights, and of queries, keys and values
    per_layer = 2 * tokens * width * 12 * width + 4 * tokens**2 * width
    patches = 2 * 196 * 768 * width
    assert result["flops_per_picture"] == pytest.approx(layers * per_layer + patches, rel=1e-3)
    assert (tmp_path / "evaluation" / "benchmark.json").exists()


# Compiling takes a CPU minutes, and the embedded world's training has tests of its own.
GPU_PARTS = ("peak", "iteration", "naive", "attention", "layouts", "profile", "fsdp")


@pytest.fixture(scope="module")
def gpu_result(tmp_path_factory: pytest.TempPathFactory):
    """What the GPU's script leaves on a CPU: a process of its own, for it sets an alarm."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    words = ["--device", "cpu", "--tiny", "--out", str(out), "--parts", ",".join(GPU_PARTS)]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(out.read_text()), run.stdout


@pytest.mark.long
@pytest.mark.slow
def test_the_gpu_script_measures_on_a_cpu(gpu_result) -> None:
    result, _ = gpu_result
    parts = result["parts"]
    assert [name for name in parts if "error" in parts[name]] == []
    iteration, rollout = parts["iteration"], result["rollout"]
    assert set(iteration["stages"]) == {"data", "rollout", "reward", "update"}
    assert iteration["reward_errors"] == []
    assert iteration["trained_pairs"] == rollout["group_size"] * rollout["num_trained_steps"]
    assert iteration["numbers"]["ratio_mean"] == 1
    for way in (parts["naive"], parts["attention"]["native"], parts["fsdp"]):
        assert way["forward_seconds"] > 0 < way["pair_seconds"]
    assert parts["attention"]["_native_flash"]["pair_seconds"] > 0
    assert "flash-attn" in parts["attention"]["flash"]["error"]
    for kind in ("rollout", "update"):
        assert parts["profile"][kind]["seconds_by_kind"]["matrix products"] > 0


@pytest.mark.long
@pytest.mark.slow
def test_the_gpu_tables_show_what_was_measured(gpu_result) -> None:
    result, printed = gpu_result
    part, predicted = result["parts"]["iteration"], result["predicted"]
    seconds, peak = part["stages"]["update"]["seconds"], result["parts"]["peak"]
    mfu = predicted["useful"]["update"] / seconds / peak["bf16_flops_per_second"]
    assert f"| update: 8 pairs | {seconds:.2f} | {mfu:.0%} |" in printed
    slow = result["parts"]["naive"]
    rollout = 12 * slow["forward_seconds"] + 4 * slow["decode"]["seconds"]
    (row,) = [line for line in printed.splitlines() if line.startswith("| rollout")]
    assert row.endswith(f"| {rollout:.2f} |")


def test_the_page_shows_the_gpu_tables(benchmark) -> None:
    file = ROOT / "benchmarks" / "gpu.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    page = (ROOT / "docs" / "performance.md").read_text()
    tables = benchmark("_gpu_tables")
    assert tables.show(result) in page
    assert tables.show({}) == ""


class StandInBench:
    """As much of the benchmark as running a part takes."""

    def __init__(self, deadline: float) -> None:
        self.result: dict = {"parts": {}}
        self.deadline = deadline
        self.saved: list[dict] = []
        self._world, self.freed = "a model", 0

    def save(self) -> None:
        self.saved.append(json.loads(json.dumps(self.result)))

    def free(self) -> None:
        self.freed += self._world is None
        self._world = "a model"


def test_a_part_that_fails_or_takes_too_long_ends_and_is_written(
    benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = benchmark("gpu")
    bench = StandInBench(time.monotonic() + 60)

    def fails(_: object, entry: dict) -> None:
        entry["known"] = 1
        raise ValueError("why")

    def hangs(_: object, entry: dict) -> None:
        entry["known"] = 2
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # what a library might do
                continue

    monkeypatch.setattr(gpu, "PARTS", {"fails": (fails, 9), "hangs": (hangs, 0.1)})
    for name in gpu.PARTS:
        gpu.Bench.run(bench, name)
    bench.deadline = time.monotonic()
    gpu.Bench.run(bench, "fails")
    first, second, third = (saved["parts"] for saved in bench.saved)
    assert first["fails"]["known"] == 1
    assert "ValueError: why" in first["fails"]["error"]
    assert second["hangs"] | {"part_seconds": 0} == {
        "known": 2, "error": "stopped after 0 s", "part_seconds": 0
    }  # fmt: skip
    assert third["fails"] == {"error": "no time was left"}
    assert bench.freed == 2  # whatever a failed part has left behind
