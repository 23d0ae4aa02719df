"""A newcomer with six photos, in a clean clone, who knows nothing but what each command prints."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image
from safetensors import safe_open
from six_photos import SMALL, take_photos

pytestmark = pytest.mark.slow


class Shell:
    """A folder with `cgrpo` of the clone on its PATH; lines are run as they were printed."""

    def __init__(self, folder: Path, clone: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "PYTHONPATH": str(clone / "src")}
        self.env["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        program = folder / "bin" / "cgrpo"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m customized_grpo "$@"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def run(self, line: str) -> str:
        """What it prints, errors and hints included."""
        done = subprocess.run(
            ["sh", "-c", line],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}"
        return done.stdout


def told_next(printed: str) -> str:
    (line,) = (line for line in printed.splitlines() if line.startswith("next: "))
    return line.removeprefix("next: ")


def readme_line(command: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return next(line for line in text.splitlines() if line.startswith(f"cgrpo {command} "))


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    take_photos(tmp_path / "photos", 6)
    return Shell(tmp_path, clone)


@pytest.mark.long
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout to clone")
@pytest.mark.timeout(900)
def test_from_six_photos_to_a_lora_in_plain_diffusers(shell: Shell) -> None:
    printed = shell.run(readme_line("init"))
    steps = [line.strip() for line in printed.splitlines() if line.strip().startswith("cgrpo ")]
    train = told_next(shell.run(steps[0]))
    generate = told_next(shell.run(f"{train} {shlex.join(SMALL)}"))
    evaluate = told_next(shell.run(generate))
    longer = told_next(shell.run(evaluate))  # so short a run changes nothing to speak of
    run = shell.folder / "my-dog" / "runs" / "my-dog"
    assert longer == f"cgrpo resume {run} --train.num_updates 4"
    export = steps[-1]
    last = told_next(shell.run(export))
    folder = shell.folder / shlex.split(export)[-1]
    assert folder.name in last

    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    (photo,) = re.findall(r"--reference (\S+)", generate)
    Image.open(photo).save(shell.folder / "reference.png")
    (shell.folder / "theirs.py").write_text(code)
    shell.run(f"{shlex.quote(sys.executable)} theirs.py")
    assert np.asarray(Image.open(shell.folder / "picture.png")).std() > 1
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as weights:
        names = list(weights.keys())
        moved = [name for name in names if "lora_B" in name and weights.get_tensor(name).any()]
    assert moved, "training has changed nothing"
