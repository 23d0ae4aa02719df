"""`cgrpo playground`: what it serves, to whom, and how it fails and ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest
from helpers import ROOT
from made_runs import make_run
from playground_tools import quick_config

from customized_grpo.cli.main import main

PAGE = (ROOT / "docs" / "playground.md").read_text(encoding="utf-8")
(BLOCK,) = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
COMMANDS = BLOCK.splitlines()
EMOJI = str(ROOT / "configs" / "emoji.yaml")


@pytest.fixture(autouse=True)
def what_the_command_sets_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")
    # Once imported in this process, gradio makes its folder there anew whenever it serves.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_what_is_missing_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "customized_grpo.tools.playground.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["playground", EMOJI]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cgrpo: error: playground needs the extra packages")
    assert error.endswith("pip install 'customized-grpo[playground]'\n")


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert main(["playground", EMOJI, "--port", str(port)]) == 2
    assert f"--port must be free, got {port}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What docs/playground.md speaks of: a run, a config and a LoRA."""
    folder = tmp_path_factory.mktemp("somewhere")
    run = make_run(quick_config(folder / "runs", name="mine"))
    shutil.copytree(run / "weights", folder / "my-lora")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "number"),
    [
        pytest.param(COMMANDS[0], signal.SIGTERM),
        *(pytest.param(line, signal.SIGINT, marks=pytest.mark.long) for line in COMMANDS[1:]),
    ],
)
def test_it_serves_this_machine_until_a_signal_and_leaves_nothing(
    folder: Path, tmp_path: Path, line: str, number: signal.Signals
) -> None:
    words = shlex.split(line.replace("8000", str(free_port())), comments=True)
    assert words[0] == "cgrpo"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-m", "customized_grpo", *words[1:]],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().removeprefix("playground: ").strip()
        assert address.startswith("http://127.0.0.1:")
        if "--port" in words:
            assert address == f"http://127.0.0.1:{words[words.index('--port') + 1]}/"
        with urllib.request.urlopen(address) as answer:
            assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
            assert " - playground" in answer.read().decode()
        with urllib.request.urlopen(f"{address}config") as answer:
            assert json.load(answer)["analytics_enabled"] is False
        assert any(tmp_path.iterdir())  # the examples' pictures
        process.send_signal(number)
        assert process.wait(60) == 0
    assert list(tmp_path.iterdir()) == []


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
