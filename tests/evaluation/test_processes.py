"""One result for any number of processes, and after a kill in the middle, to the last byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from worlds import smooth, write_jsonl, write_outputs

from customized_grpo.config import JsonlSet
from customized_grpo.evaluation.sets import build_set

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
METRICS = [
    {"type": "clip-text", "objective": "prompt", "path": "embedded:evaluator-clip"},
    {"type": "dinov2", "objective": "identity", "path": "embedded:evaluator-dino"},
]
SLOW = {"type": "slow_metric:SlowConfig", "objective": "quality"}


def start(
    folder: Path, config: dict, processes: int | None, *overrides: str
) -> subprocess.Popen[str]:
    """`cgrpo evaluate` in ``folder``, alone or by torchrun."""
    folder.mkdir(exist_ok=True)
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(config))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [
        sys.executable,
        *(launcher if processes else []),
        *["-m", "customized_grpo", "evaluate", "benchmark.yaml", *overrides],
    ]
    path = os.pathsep.join([str(ROOT / "src"), str(HERE), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str], folder: Path) -> dict[str, bytes]:
    """The files of the result."""
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]
    assert out.count("## All pictures") == 1  # one process prints
    results = folder / "evaluations" / "test"
    names = ("benchmark.json", "benchmark.md", "gallery.html")
    return {name: (results / name).read_bytes() for name in names}


@pytest.fixture
def config(tmp_path: Path) -> dict:
    benchmark = JsonlSet(path=str(write_jsonl(tmp_path)))
    wanted = build_set(benchmark, num_images=3)
    images = write_outputs(
        tmp_path / "outputs", wanted, lambda i: smooth(9 * i.prompt_index + i.index)
    )
    return {
        "name": "test",
        "device": "cpu",
        "benchmark": {"type": "jsonl", "path": benchmark.path},
        "images": str(images),
        "num_images": 3,
        "metrics": METRICS,
        "batch_size": 4,
    }


def kill(process: subprocess.Popen[str], when: Callable[[], bool]) -> None:
    """In the middle: it has not ended by itself."""
    while process.poll() is None and not when():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path, config: dict) -> None:
    alone = finished(start(tmp_path / "alone", config, None), tmp_path / "alone")
    for processes in (1, 3):  # two end what was killed, below
        folder = tmp_path / str(processes)
        assert finished(start(folder, config, processes), folder) == alone, processes


@pytest.mark.long
def test_a_killed_evaluation_goes_on(tmp_path: Path, config: dict) -> None:
    config = config | {"metrics": [*METRICS, SLOW]}
    straight = finished(start(tmp_path / "straight", config, None), tmp_path / "straight")
    folder = tmp_path / "killed"
    cache = folder / "evaluations" / "test" / "cache"
    kill(start(folder, config, None), lambda: len(list(cache.glob("*.safetensors"))) >= 8)
    done = {file: file.stat().st_mtime_ns for file in cache.glob("*.safetensors")}
    assert len(done) >= 8
    assert not (folder / "evaluations" / "test" / "benchmark.json").exists()
    assert finished(start(folder, config, 2), folder) == straight
    assert all(file.stat().st_mtime_ns == when for file, when in done.items())


@pytest.mark.long
def test_sampling_too(tmp_path: Path, config: dict) -> None:
    """Killed while it samples, then by two processes: the pictures are those of one."""
    generator = {"type": "flux-kontext", "path": "embedded:generator"}
    config = {name: value for name, value in config.items() if name != "images"}
    config |= {
        "benchmark": {"type": "emoji", "num_examples": 10},
        "num_images": 2,
        "generator": generator,
        "sampling": {"num_steps": 8, "batch_size": 2},
    }
    straight = finished(start(tmp_path / "straight", config, None), tmp_path / "straight")
    folder = tmp_path / "killed"
    images = folder / "evaluations" / "test" / "images"
    kill(start(folder, config, None), lambda: len(list(images.rglob("*.png"))) >= 5)
    assert 5 <= len(list(images.rglob("*.png"))) < 20
    assert not (images / "manifest.jsonl").exists()
    assert finished(start(folder, config, 2), folder) == straight
