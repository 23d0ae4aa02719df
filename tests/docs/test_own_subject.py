"""From photos to a LoRA: every command of docs/own_subject.md, and what comes after training."""

import re
from pathlib import Path

import pytest
import torch
from data.pictures import DREAMBENCH, on_the_dataset
from helpers import ROOT
from six_photos import SMALL, take_photos
from snippets import commands, snippets

from customized_grpo.cli.main import main
from customized_grpo.cli.shared import after_training
from customized_grpo.config import load_config

PAGE = "docs/own_subject.md"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with six photos."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    take_photos(tmp_path / "photos", 6)
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_the_page(here: Path) -> None:
    Path("prompts.txt").write_text(snippets(PAGE, "text")["prompts.txt"])
    for program, *words in commands(PAGE):
        assert program == "cgrpo"
        assert main([*words, *(SMALL if words[0] == "train" else [])]) == 0, words
    (rows,) = re.findall(r"(?s)\| in `my-dog/` .*?\n\n", (ROOT / PAGE).read_text())
    for name in re.findall(r"^\| `([\w./]+)`", rows, re.M):
        assert Path("my-dog", name).exists(), name
    assert load_config("my-dog-24gb/config.yaml").generator.type == "flux2-klein"
    assert load_config("my-dog-kontext/config.yaml").generator.type == "flux-kontext"
    assert len(list(Path("generated").glob("*.png"))) == 9


def test_what_comes_after_training_depends_on_the_data(here: Path) -> None:
    emoji = ROOT / "configs" / "emoji.yaml"
    assert after_training(load_config(emoji), Path("run")) == ("evaluate", Path("run"))
    flags = ("--evaluators", "[]", "--evaluation.validate_every", "0")
    bare = load_config(emoji, [*flags, "--evaluation.classifier", "null"])
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
    assert main(["init", "my-dog", "--class", "dog", "--photos", str(DREAMBENCH / "dog6")]) == 0
    assert main(["train", "my-dog/config.yaml", *SMALL]) == 0
    assert Path("my-dog/runs/my-dog/weights/pytorch_lora_weights.safetensors").exists()
