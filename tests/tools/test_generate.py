"""`cgrpo generate`: own prompts and references, base beside tuned, whatever the batch."""

import dataclasses
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from helpers import changed, error_line
from made_runs import make_run
from PIL import Image

from customized_grpo.cli.main import main
from customized_grpo.config import RunConfig
from customized_grpo.config.text_limits import unknown_words
from customized_grpo.data.emoji.catalog import _CLASS_RUNS
from customized_grpo.errors import CheckpointError, ResourceError
from customized_grpo.tools import generate as generate_module
from customized_grpo.tools.generate import (
    Shot,
    Target,
    generate,
    open_target,
    prompt_remarks,
    read_prompts,
)
from customized_grpo.tools.init.prompts import write_embedded

FOX, CUP = "a golden fox on the beach", "a cup in the snow"


@pytest.fixture
def run(tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run; two references lie in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a.png", 0), ("b.png", 1)):
        random = np.random.default_rng(seed)
        small = Image.fromarray(random.integers(0, 255, (8, 8, 3), np.uint8))
        small.resize((64, 64), Image.Resampling.NEAREST).save(name)
    return make_run(changed(tiny_config, rollout={"num_steps": 2, "num_trained_steps": 1}))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def texts(path: Path) -> dict:
    with Image.open(path) as image:
        return dict(image.text)  # pyright: ignore


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_base_and_tuned_of_a_run_say_how_they_were_made(
    run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = ["generate", str(run), "--prompt", FOX, "--reference", "a.png", "--seeds", "3"]
    assert main([*words, "--count", "2", "--strength", "0.5"]) == 0
    out = capsys.readouterr().out
    assert out == "pictures: generated\ncontact sheet: generated/sheet.png\n"
    assert "the embedded model does not know 'fox'; it knows animal" in caplog.text
    files = [
        f"000{number}-a-golden-fox-on-the-beach-seed{seed}-{model}.png"
        for number, seed in ((1, 3), (2, 4))
        for model in ("base", "tuned")
    ]
    assert names(Path("generated")) == [*files, "sheet.png"]
    base, tuned = (texts(Path("generated", file)) for file in files[:2])
    assert tuned["prompt"] == FOX
    assert (tuned["seed"], tuned["strength"], tuned["references"]) == ("3", "0.5", "a.png")
    assert tuned["run"] == run.name
    assert "torch 2." in tuned["software"]
    assert "strength" not in base
    assert str(Path.cwd()) not in str(base) + str(tuned)
    assert np.abs(pixels(Path("generated", files[0])) - pixels(Path("generated", files[1]))).max()
    assert main([*words, "--no-metadata", "--no-base"]) == 0  # a second call takes a new folder
    assert names(Path("generated-2")) == [files[1], "sheet.png"]
    assert texts(Path("generated-2", files[1])) == {}


def test_words_that_the_embedded_model_has_never_seen_are_named() -> None:
    line = unknown_words("embedded:generator", [FOX, "a Dog, or DOGS, on the beach"])
    assert line.startswith("the embedded model does not know 'fox', 'dog', 'or', 'dogs'; it knows")
    assert unknown_words("a/model", [FOX]) == unknown_words("embedded:generator", [CUP]) == ""
    many = unknown_words("embedded:generator", ["one two three four five six seven"])
    assert "'five' and 2 more; it knows" in many
    random, nouns = Random(0), sorted({noun for _, noun in _CLASS_RUNS if noun})
    kinds = ("context", "property", "accessory")
    its_own = [write_embedded(n, k, h, random) for n in nouns for k in kinds for h in (True, False)]
    assert unknown_words("embedded:generator", its_own) == ""


def test_a_prompt_that_is_read_in_part_is_said(tiny_config: RunConfig) -> None:
    assert prompt_remarks(tiny_config, [CUP]) == []
    (line,) = prompt_remarks(tiny_config, [CUP, " ".join([CUP] * 10)])
    assert line.startswith("generator: reads 30 tokens of a prompt; 1 of 2 prompts are longer")


def test_a_picture_depends_on_seed_prompt_and_references_alone(run: Path) -> None:
    rows = [
        {"prompt": FOX, "references": ["a.png"]},
        {"prompt": CUP, "references": ["b.png"]},
        {"prompt": FOX, "references": ["b.png"]},
    ]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["generate", str(run), "--file", "prompts.jsonl", "--seeds", "7", "5"]
    assert main([*words, "--batch-size", "4", "--out", "together"]) == 0
    alone = ["generate", str(run), "--prompt", FOX, "--reference", "b.png", "--seeds", "5"]
    assert main([*alone, "--out", "alone"]) == 0
    slug = "a-golden-fox-on-the-beach-seed5"
    for model in ("base", "tuned"):
        one = pixels(Path("alone", f"0001-{slug}-{model}.png"))
        again = pixels(Path("together", f"0006-{slug}-{model}.png"))
        assert np.abs(one - again).max() <= 1  # 8 bit: what rounding alone can change
        others = Path("together").glob(f"*-{model}.png")
        close = [p for p in others if np.abs(one - pixels(p)).mean() < 1]
        assert close == [Path("together", f"0006-{slug}-{model}.png")]


def test_strength_goes_from_the_base_to_what_was_trained_and_on(run: Path) -> None:
    differences = []
    for strength in ("0", "0.5", "1", None):
        words = ["generate", str(run), "--prompt", FOX, "--reference", "a.png"]
        out = f"at-{strength}"
        more = [] if strength is None else ["--strength", strength]
        assert main([*words, *more, "--out", out]) == 0
        base, tuned = (
            pixels(next(Path(out).glob(f"*-{model}.png"))) for model in ("base", "tuned")
        )
        differences.append(np.abs(base - tuned).mean())
    zero, half, one, trained = differences
    assert zero == 0
    assert 0 < half < one == trained


def test_a_config_makes_pictures_of_the_base_or_of_a_lora_folder(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(run / "config.yaml"), "--prompt", FOX, "--reference", "a.png"]
    assert main([*words, "--out", "base"]) == 0
    assert main([*words, "--lora", str(run / "weights"), "--out", "both"]) == 0
    assert main(["generate", str(run), *words[2:], "--out", "of-run"]) == 0
    tuned = "0001-a-golden-fox-on-the-beach-seed0-tuned.png"
    assert [name.split("-")[-1] for name in names(Path("base"))] == ["base.png", "sheet.png"]
    assert (pixels(Path("both", tuned)) == pixels(Path("of-run", tuned))).all()
    capsys.readouterr()
    assert "--no-base must be left out" in error_line(capsys, *words, "--no-base")
    assert "no LoRA, got 0.5" in error_line(capsys, *words, "--strength", "0.5")
    assert "must hold pytorch_lora" in error_line(capsys, *words, "--lora", "base")


def test_all_weights_have_no_strength(
    tiny_config: RunConfig, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(tiny_config, rollout={"num_steps": 2, "num_trained_steps": 1})
    full = make_run(dataclasses.replace(config, name="full-weights"), lora=False)
    words = ["generate", str(full), "--prompt", FOX, "--reference", "a.png", "--out", "full"]
    assert "no LoRA" in error_line(capsys, *words, "--strength", "1")
    assert not Path("full").exists()
    assert main(words) == 0
    base, tuned = (pixels(next(Path("full").glob(f"*-{model}.png"))) for model in ("base", "tuned"))
    assert np.abs(base - tuned).mean() > 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prompt", FOX], "--reference must be given, got none"),
        (["--reference", "a.png"], "--prompt must be given, got none"),
        (["--prompt", " ", "--reference", "a.png"], "--prompt: text: must be a non-empty"),
        (["--prompt", FOX, "--reference", "none.png"], "none.png"),
        (["--file", "x.jsonl", "--prompt", FOX], "--file must be left out with --prompt"),
        (
            ["--prompt", FOX, "--reference", "a.png", "--reference", "b.png"],
            "takes exactly one reference, got 2",
        ),
        (
            ["--prompt", FOX, "--reference", "a.png", "--seeds", "1", "2", "--count", "2"],
            "--count must be left out with several --seeds",
        ),
        (["--prompt", FOX, "--reference", "a.png", "--seeds", "-1"], "from 0 to 2^32 - 1"),
        (["--prompt", FOX, "--reference", "a.png", "--out", "."], "--out must be a new or empty"),
        (["--prompt", FOX, "--reference", "a.png", "--lora", "x"], "--lora must be left out"),
        (
            ["--prompt", FOX, "--reference", "a.png", "--size", "64x128"],
            "--size: height: must be 64 for embedded:generator, which has seen no other pictures, "
            "got 128; leave it out",
        ),
        (["--prompt", FOX, "--reference", "a.png", "--size", "64"], "must be WIDTHxHEIGHT in"),
        (
            ["--prompt", FOX, "--reference", "a.png", "--strength", "nan"],
            "--strength must be a finite number, got nan",
        ),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert expected in error_line(capsys, "generate", run, *words)
    assert not list(Path().glob("generated*"))


def test_a_folder_that_is_no_run_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", FOX, "--reference", "a.png"]
    assert "config.yaml is not in it" in error_line(capsys, "generate", run.parent, *words)


def test_many_pictures_make_several_sheets(
    run: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: RunConfig
) -> None:
    monkeypatch.setattr(generate_module, "_SHEET_ROWS", 2)
    (entry,) = read_prompts([FOX], [Path("a.png")], None)
    shots = [Shot(entry=entry, seed=seed) for seed in range(3)]
    sheets = generate(Target(config=tiny_config), shots, Path("many"))
    assert [sheet.name for sheet in sheets] == ["sheet-001.png", "sheet-002.png"]
    assert pixels(sheets[0]).shape[0] - pixels(sheets[1]).shape[0] == 152  # one row


def test_memory_that_runs_out_names_the_option(
    run: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: RunConfig
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(generate_module, "FixedSampler", fail)
    (entry,) = read_prompts([FOX], [Path("a.png")], None)
    with pytest.raises(ResourceError, match="lower --batch-size"):
        generate(Target(config=tiny_config), [Shot(entry=entry, seed=0)], Path("none"))


def test_a_run_that_is_not_there_yet_is_to_be_trained() -> None:
    with pytest.raises(CheckpointError, match=r"got 'runs/none', which is not there.*train first"):
        open_target(Path("runs/none"))
