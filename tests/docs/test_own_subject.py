"""From photos to a LoRA: every command of docs/own_subject.md, and those that are printed."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from data.pictures import DREAMBENCH, on_the_dataset
from helpers import ROOT
from six_photos import SMALL, take_photos

from customized_grpo.cli.main import main
from customized_grpo.cli.shared import after_training
from customized_grpo.config import load_config

PAGE = (ROOT / "docs" / "own_subject.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with six photos."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    take_photos(tmp_path / "photos", 6)
    return tmp_path


def run(line: str, *more: str) -> None:
    words = shlex.split(line)
    assert words[0] == "cgrpo"
    assert main([*words[1:], *more]) == 0, line


@pytest.mark.slow
def test_the_commands_of_the_page(here: Path) -> None:
    (prompts,) = blocks("text prompts.txt")
    Path("prompts.txt").write_text(prompts)
    for line in (line for block in blocks("bash") for line in block.splitlines()):
        run(line, *(SMALL if line.startswith("cgrpo train") else []))
    (rows,) = re.findall(r"(?s)\| in `my-dog/` .*?\n\n", PAGE)
    for name in re.findall(r"^\| `([\w./]+)`", rows, re.M):
        assert Path("my-dog", name).exists(), name
    assert load_config("my-dog-24gb/config.yaml").generator.type == "flux2-klein"
    assert load_config("my-dog-kontext/config.yaml").generator.type == "flux-kontext"
    assert len(list(Path("generated").glob("*.png"))) == 9


def next_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The command after the one that has just run."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("next: ")]
    assert len(lines) == 1, lines
    return lines[0].removeprefix("next: ")


@pytest.mark.slow
def test_every_command_leads_to_the_next(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("cgrpo init my-dog --photos photos --class dog")
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    printed = [line for line in printed if line.startswith("cgrpo ")]
    run(printed[0])
    train = next_line(capsys)
    assert train == printed[1]
    run(train, *SMALL)
    generate = next_line(capsys)
    first = json.loads(Path("my-dog/held_out.jsonl").read_text().splitlines()[0])
    assert shlex.split(generate)[4] == first["prompt"]
    run(generate)
    assert len(list(Path("generated").glob("*-tuned.png"))) == 4
    evaluate = next_line(capsys)
    run(evaluate)
    export = next_line(capsys)
    run(generate)
    assert next_line(capsys) == export  # once it is evaluated
    run(export)
    assert capsys.readouterr().err.startswith("next: ")
    assert Path("my-dog-lora/pytorch_lora_weights.safetensors").exists()
    for line in printed[2:]:
        run(line)
    assert Path("my-dog/lora/README.md").exists()


def test_what_comes_after_training_depends_on_the_data(here: Path) -> None:
    emoji = ROOT / "configs" / "emoji.yaml"
    assert after_training(load_config(emoji), Path("run")) == ("evaluate", Path("run"))
    bare = load_config(emoji, ["--evaluators", "[]", "--evaluation.classifier", "null"])
    assert after_training(bare, Path("run"))[:2] == ("export", Path("run"))
    Path("run-lora").mkdir()
    assert after_training(bare, Path("run"))[-2:] == ("--out", Path("run-lora-2"))
    own = load_config(emoji, ["--data", "{type: folder, path: photos}"])
    command, run, _, prompt, _, reference, *_ = after_training(own, Path("run"))
    assert (command, run) == ("generate", Path("run"))
    assert "photos" in str(prompt)
    assert Path(str(reference)).exists()
    Path(str(reference)).write_bytes(b"damaged meanwhile")
    assert after_training(own, Path("run")) == ("evaluate", Path("run"))


@on_the_dataset
@pytest.mark.slow
def test_real_photos_train(here: Path) -> None:
    words = shlex.split("cgrpo init my-dog --class dog --photos")
    assert main([*words[1:], str(DREAMBENCH / "dog6")]) == 0
    assert main(["train", "my-dog/config.yaml", *SMALL]) == 0
    assert Path("my-dog/runs/my-dog/weights/pytorch_lora_weights.safetensors").exists()
