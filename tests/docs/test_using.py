"""Every command and snippet of docs/using.md, in order, with a run in runs/mine."""

import dataclasses
from pathlib import Path

import pytest
from helpers import changed
from made_runs import make_run
from PIL import Image
from snippets import blocks, commands, snippets

from customized_grpo.cli.main import main
from customized_grpo.config import RunConfig

PAGE = "docs/using.md"


@pytest.fixture
def mine(tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run that the page speaks of, and the pictures and files beside it."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 64), "brown").save("bear.png")
    Path("prompts.jsonl").write_text(snippets(PAGE, "jsonl")["prompts.jsonl"])
    config = changed(tiny_config, rollout={"num_steps": 2, "num_trained_steps": 1})
    return make_run(dataclasses.replace(config, name="mine", output_dir="runs"))


def test_commands(mine: Path) -> None:
    for program, *words in commands(PAGE):
        assert program == "cgrpo"
        assert main(words) == 0, words
    assert len(list(Path("generated").iterdir())) == 9
    assert len(list(Path("mine").iterdir())) == 5
    assert Path("my-lora/README.md").exists()
    assert Path("loras/mine.safetensors").exists()
    assert Path("my-model/model_index.json").exists()


def test_the_lora_loads_in_plain_diffusers(mine: Path) -> None:
    (snippet,) = blocks(PAGE, "python")
    names: dict = {}
    exec(snippet, names)
    assert names["pipeline"].get_list_adapters() == {"transformer": ["default_0"]}
    assert names["image"].size == (64, 64)
