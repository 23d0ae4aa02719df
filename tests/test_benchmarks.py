"""The benchmarks run, and count what they say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from chaos import small_run
from helpers import ROOT

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
@pytest.mark.parametrize("flags", [[], pytest.param(["--fsdp"], marks=pytest.mark.long)])
def test_processes_ends_with_a_ratio(
    benchmark, tmp_path: Path, monkeypatch, capsys, flags: list[str]
) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(dump_config(small_run(tmp_path, "small", 4)))
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
