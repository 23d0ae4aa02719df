"""The script completes in a real shell."""

import shutil
import subprocess
from pathlib import Path

import pytest

from customized_grpo.cli.main import main

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@pytest.fixture
def complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What bash offers for the last of some words."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").touch()
    assert main(["completion", "bash"]) == 0
    (tmp_path / "completion.sh").write_text(capsys.readouterr().out)
    lines = [
        "source completion.sh",
        'COMP_WORDS=(cgrpo "$@"); COMP_CWORD=$#; COMPREPLY=()',
        '_shtab_cgrpo cgrpo "${COMP_WORDS[$COMP_CWORD]}" ""',
        "printf '%s\\n' \"${COMPREPLY[@]}\"",
    ]

    def offered(*words: str) -> list[str]:
        command = ["bash", "-c", "\n".join(lines), "bash", *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout.split()

    return offered


def test_commands_options_choices_and_fields(complete) -> None:
    assert complete("expo") == ["export"]
    assert complete("evaluate", "runs", "--spl") == ["--split"]
    assert complete("export", "runs", "--to", "co") == ["comfyui"]
    assert complete("train", "run.yaml", "--rollout.gr") == ["--rollout.group_size"]
    assert complete("resume", "runs", "--allow") == ["--allow-changed"]


def test_files(complete) -> None:
    assert complete("train", "ru") == ["run.yaml"]
    assert complete("generate", "ru") == ["run.yaml"]
    assert complete("serve-reward", "ru") == ["run.yaml"]


def test_other_shells_and_unknown_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef cgrpo")
    assert main(["completion", "fish"]) == 2
    assert "bash" in capsys.readouterr().err
