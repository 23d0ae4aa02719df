"""What several test modules share."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from customized_grpo.cli.main import main
from customized_grpo.config import RunConfig, dump_config, load_config
from customized_grpo.types import Example

ROOT = Path(__file__).parents[1]


def changed(config: RunConfig, **sections: dict[str, object]) -> RunConfig:
    """The config with some fields of some sections replaced."""
    replaced = {
        name: dataclasses.replace(getattr(config, name), **fields)
        for name, fields in sections.items()
    }
    return dataclasses.replace(config, **replaced)


def tiny(folder: Path) -> RunConfig:
    """configs/emoji.yaml, cut down to seconds; float32 so that numbers can be compared tightly."""
    overrides = {
        "output_dir": str(folder / "runs"),
        "mixed_precision": "no",
        "lora.rank": 4,
        "rollout.num_steps": 4,
        "rollout.num_trained_steps": 2,
        "rollout.group_size": 3,
        "rollout.prompts_per_rollout": 2,
        "train.num_updates": 2,
        "train.inner_updates": 1,
        "evaluation.num_examples": 4,
        "evaluation.validate_every": 0,
    }
    flags = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
    return load_config(ROOT / "configs" / "emoji.yaml", flags)


def metrics(run: Path) -> list[dict[str, float]]:
    """Rows of a run's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def error_line(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command says that fails: one line."""
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("cgrpo: error: ")
    return err


def import_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules called ``my_...`` come from a folder, whatever another test has imported."""
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.startswith("my_")]:
        monkeypatch.delitem(sys.modules, name)


def targets(examples: Sequence[Example]) -> torch.Tensor:
    """The ground truth of examples that have one ``[B, 3, H, W]``."""
    return torch.stack([e.target for e in examples if e.target is not None])


def perturb_lora(transformer: torch.nn.Module, std: float = 0.05) -> None:
    """Gives adapters an effect, which fresh ones do not have: their B is zero."""
    random = torch.Generator().manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=std, generator=random)


def assert_near(actual: Any, expected: Any, terms: int = 2**12, scale: float = 0.0) -> None:
    """Equal but for the rounding of float32, which every CPU does in an order of its own.

    A sum of ``terms`` numbers is off by about ``eps sqrt(terms)`` times their size, so that is the
    bound: it grows with the numbers and was not tuned to the machine at hand.

    Args:
        actual: a tensor, or what becomes one.
        expected: likewise; NaN equals NaN.
        terms: additions behind a number. The default is for a small model's output: 8e-6.
        scale: size of the numbers that were added, where their sum may be far smaller, as a cosine
            of unit vectors may; otherwise the largest expected number tells it.
    """
    actual, expected = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    scale = max(scale, expected.nan_to_num().abs().max().item())
    bound = torch.finfo(torch.float32).eps * math.sqrt(terms) * scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound, equal_nan=True)


def wait_until(condition: Callable[[], object]) -> None:
    """Returns when the condition holds, however slow the machine is; pytest has a limit."""
    while not condition():
        time.sleep(0.005)


def torchrun(config: RunConfig, folder: Path, *flags: str) -> subprocess.Popen[str]:
    """`cgrpo train` in two processes."""
    file = folder / f"{config.name}.yaml"
    file.write_text(dump_config(config))
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command = [*launcher, "-m", "customized_grpo", "train", str(file), *flags]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors[-3000:]
    return out, errors


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "weights").rglob("*.safetensors")
    return load_file(file)
