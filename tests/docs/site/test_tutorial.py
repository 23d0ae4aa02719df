"""The commands of docs/tutorial.md in order, and those of other pages that had no test."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image
from snippets import blocks, commands

from customized_grpo.cli.main import main
from customized_grpo.config import RunConfig, dump_config, load_config, shipped
from customized_grpo.training import train as trainer

SMALL = [
    "--lora.rank", "4",
    "--rollout.prompts_per_rollout", "1",
    "--rollout.group_size", "2",
    "--rollout.num_steps", "3",
    "--rollout.num_trained_steps", "1",
    "--train.num_updates", "1",
    "--train.inner_updates", "1",
    "--evaluation.num_validation", "2",
]  # fmt: skip


TUTORIAL = "docs/tutorial.md"


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the configs, in which the demo is small, but for its examples: of these are
    the kept pictures of naive GRPO."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    small = tmp_path / "small.yaml"
    small.write_text(dump_config(load_config("configs/emoji.yaml", SMALL)))
    monkeypatch.setattr(shipped, "shipped_config", lambda name: small)
    return tmp_path


def run(command: list[str]) -> None:
    """The example's own flags come last, and win."""
    program, *words = command
    if program == "make":
        printed = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, check=True)
        assert f"cgrpo {words[0]}" in printed.stdout.decode()
        return run(["cgrpo", *words])
    if program == "source":
        return None
    assert program == "cgrpo", command
    small = SMALL if words[0] == "train" and "--help" not in words else []
    assert main([*words[:2], *small, *words[2:]]) == 0, command
    return None


@pytest.mark.long
@pytest.mark.slow
def test_the_tutorial(monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = blocks(TUTORIAL, "python")
    exec(snippet, {})
    for command in commands(TUTORIAL):
        run([word for word in command if word not in ("--train.num_updates", "80")])
    assert Path("runs/demo-seed0/report.html").exists()
    assert Path("both/report.html").exists()
    assert Image.open("reference.png").size == (64, 64)
    assert len(list(Path("generated").glob("*.png"))) == 9
    assert Path("my-lora/pytorch_lora_weights.safetensors").exists()


def test_the_two_commands_of_the_landing_page_are_tested_elsewhere() -> None:
    shown = [[Path(program).name, *words] for program, *words in commands("docs/index.md")]
    assert len(shown) == 2
    assert all(command in commands(TUTORIAL) for command in shown)


@pytest.mark.slow
def test_going_on_with_a_run() -> None:
    assert main(["train", "configs/emoji.yaml", "--name", "mine", *SMALL]) == 0
    for program, *words in commands("docs/reliability.md"):
        if program == "cgrpo":
            more = ["--train.num_updates", "2"] if "400" in words or words[0] == "train" else []
            run([program, *words, *more])
    assert '"updates": 2' in Path("runs/mine/finished.json").read_text()


def test_overrides(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trained: list[RunConfig] = []

    def train(config: RunConfig, **options: bool) -> Path:
        trained.append(config)
        return Path(config.name)

    monkeypatch.setattr(trainer, "train", train)
    for command in commands("docs/reference/config.md"):
        run(command)
    fields, sections = trained
    assert (fields.rollout.group_size, fields.train.betas) == (4, (0.9, 0.99))
    assert (sections.lora, sections.advantage.schedule.type) == (None, "constant")
    assert "--rollout.num_steps = 6" in capsys.readouterr().out
