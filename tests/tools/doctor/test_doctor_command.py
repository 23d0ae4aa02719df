"""`cgrpo doctor`: what it prints, and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from customized_grpo.cli.main import main
from customized_grpo.config import RunConfig, dump_config

LONG = "/a/path/" + "that/goes/on/" * 9 + "and/ends"


@pytest.fixture
def config(tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(dump_config(tiny_config))
    return Path("run.yaml")


def findings(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, str]]:
    capsys.readouterr()
    code = main(["doctor", *arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == any(finding["status"] == "problem" for finding in found)
    for finding in found:
        assert set(finding) == {"check", "status", "found", "fix"}
        assert bool(finding["fix"]) == (finding["status"] != "ok"), finding
    return {finding["check"]: finding for finding in found}


def test_a_config_that_will_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys, "run.yaml")
    assert not [f for f in found.values() if f["status"] == "problem"]
    expected = {
        "python", "packages", "cpu", "ram", "config", "name", "generator.path", "rewards.1.path",
        "evaluation.classifier", "data", "memory", "output_dir", "disk of output_dir",
        "disk of the hub's cache", "extras",
    }  # fmt: skip
    assert expected <= set(found)
    assert list(Path().iterdir()) == [config]


@pytest.mark.slow
def test_lines_and_exit_codes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "run.yaml", "--generator.path", LONG]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "ok      config: run.yaml is valid" in lines
    bad = [text for text in lines if text.startswith("problem")]
    assert bad[0].startswith(f"problem generator.path: checkpoint '{LONG}' not found -> ")
    (memory,) = [text for text in lines if text.partition(" ")[2].strip().startswith("memory: ")]
    assert "counted as black-forest-labs/FLUX.1-Kontext-dev" in memory  # its weights are not there
    assert lines[-1].startswith(f"{len(bad)} problem")


def test_mistakes_in_the_config(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(config.read_text().replace("group_size:", "group_sise:"))
    found = findings(capsys, "run.yaml")
    assert "group_sise" in found["config"]["found"]
    assert found["config"]["fix"] == "did you mean 'group_size'?"
    assert findings(capsys, "run.yaml", "--sed", "3")["config"]["status"] == "problem"
    assert "ram" in found
    assert "memory" not in found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nothing.yaml"], "CONFIG must be a YAML file or the folder of a run"),
        (["."], "CONFIG must be a YAML file or the folder of a run"),
        (["--seed=3"], "CONFIG must come first, got --seed=3"),
    ],
)
def test_wrong_usage(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert main(["doctor", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_a_gpu_that_is_busy(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def memory(number: int) -> tuple[int, int]:
        if number == 0:
            raise RuntimeError("CUDA error: devices are busy\nCompile with TORCH_USE_CUDA_DSA")
        return 80 * 10**9, 80 * 10**9

    card = SimpleNamespace(name="Card", major=9)
    for name, value in (
        ("is_available", lambda: True),
        ("device_count", lambda: 2),
        ("get_device_properties", lambda number: card),
        ("mem_get_info", memory),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    found = findings(capsys, "run.yaml", "--sed", "3")
    assert found["gpu 0"]["status"] == "problem"
    assert found["gpu 0"]["found"] == "it cannot be used: CUDA error: devices are busy"
    assert "nvidia-smi" in found["gpu 0"]["fix"]
    assert "CUDA_VISIBLE_DEVICES" in found["gpu 0"]["fix"]
    assert found["gpu 1"]["status"] == "ok"
    assert found["gpu 1"]["found"].startswith("Card, 80.0 GB")


@pytest.mark.slow
@pytest.mark.long
def test_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys)
    names = {f"fits: {path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert names <= set(found)
    assert found["fits: emoji.yaml"]["status"] == "ok"
    assert all(found[name]["status"] != "problem" for name in names)
    assert all("predicted" in found[name]["found"] for name in names)


def test_a_library_that_cannot_be_imported(config: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise OSError('libcudart.so.99: no such file')")
    paths = [str(tmp_path / "broken"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "customized_grpo", "doctor", "run.yaml", "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    last = json.loads(done.stdout)[-1]
    assert last["check"] == "import"
    assert "libcudart.so.99" in last["found"]
