"""A project: a folder on which `cgrpo train` works unchanged, and the commands from there on."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, error_line
from made_photos import photo, take
from PIL import Image

from customized_grpo.cli.main import _parse, main
from customized_grpo.cli.shared import after_training
from customized_grpo.config import load_config
from customized_grpo.data.overview import show_data
from customized_grpo.errors import ConfigError
from customized_grpo.tools.init import project as project_module
from customized_grpo.tools.init.models import PRESETS, choose_preset


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten good photos in photos/ of the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return take(tmp_path / "photos", 10, (96, 96))


def init(*words: str) -> list[str]:
    return ["init", "my-dog", "--photos", "photos", "--class", "dog", *words]


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in Path("my-dog", name).read_text().splitlines()]


@pytest.mark.parametrize("model", PRESETS)
def test_the_config_is_the_one_that_ships_for_these_photos(
    photos: Path, model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(init("--model", model, "--seed", "5")) == 0
    folder = photos.parent / "my-dog"
    monkeypatch.chdir("/")  # paths hold from anywhere
    config = load_config(folder / "config.yaml")
    shipped = load_config(ROOT / "configs" / PRESETS[model].config)
    assert (config.name, config.seed) == ("my-dog", 5)
    assert config.output_dir == str(folder / "runs")
    for section in ("generator", "evaluators", "lora", "rollout", "advantage", "mixed_precision"):
        assert getattr(config, section) == getattr(shipped, section), section
    assert (config.rewards == shipped.rewards) is (model != "uno")
    assert config.train.learning_rate == shipped.train.learning_rate
    counts = show_data(config, tmp_path / "data.png")
    assert "training: 336 examples\nheld out: 24," in counts
    assert config.evaluation.num_examples == 24
    validation = config.evaluation.num_validation
    assert 8 <= validation <= min(shipped.evaluation.num_validation, 48)
    assert config.evaluation.validate_every == shipped.evaluation.validate_every > 0
    assert len(config.data.build(0).validation(1000)) == 48


@pytest.mark.parametrize("model", PRESETS)
def test_every_number_of_the_config_is_explained(photos: Path, model: str) -> None:
    assert main(init("--model", model)) == 0
    text = Path("my-dog/config.yaml").read_text()
    lines = text.splitlines()
    assert [line for line in lines if len(line) > 100 and str(photos.parent) not in line] == []
    unexplained = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if re.search(r"^ *\w+: ([\d.]|true|false)", line)
        and "#" not in line
        and not before.lstrip().startswith("# ")
    ]
    assert unexplained == []
    sections = yaml.safe_load(text)
    assert len(re.findall(r"^\s*\w+: [\d.]", text, re.M)) >= 8
    for section in set(sections) - {"name", "seed", "output_dir", "mixed_precision"}:
        assert re.search(rf"^# .+\n{section}:", text, re.M), section


def test_the_small_model_is_set_up_for_minutes_and_told_what_to_expect(photos: Path) -> None:
    assert main(init()) == 0
    text = Path("my-dog/config.yaml").read_text()
    config = load_config("my-dog/config.yaml")
    assert config.generator.path == "embedded:generator"  # pyright: ignore
    assert config.train.num_updates == 40
    assert config.evaluation.classifier is None
    assert "no photo" in " ".join(text.replace("#", " ").split())
    with Image.open("my-dog/photos/01-a.png") as image:
        assert image.size == (96, 96)
    assert all("animal" in row["prompt"] and row["subject"] == "dog" for row in rows("train.jsonl"))


def test_training_and_held_out_share_neither_prompts_nor_photos(photos: Path) -> None:
    assert main(init("--model", "flux2-klein-base")) == 0
    parts = [rows(f"{name}.jsonl") for name in ("train", "held_out", "validation")]
    prompts, pictures = (
        [{str(row[key]) for row in part} for part in parts] for key in ("prompt", "references")
    )
    assert [len(some) for some in prompts] == [42, 12, 6]
    assert [len(some) for some in pictures] == [8, 2, 8]
    assert len(set.union(*prompts)) == 60
    assert not pictures[0] & pictures[1]
    assert pictures[0] == pictures[2]  # validation is of what is trained on, by other prompts
    ids = [row["id"] for part in parts for row in part]
    assert len(set(ids)) == len(ids)
    assert {row_id.split("-")[0] for row_id in ids} == {"context", "property", "accessory"}


def test_few_photos_are_all_trained_on_and_twins_never_kept_aside(photos: Path) -> None:
    for name in "efghij":
        (photos / f"{name}.jpg").unlink()
    assert main(init()) == 0
    parts = [rows("train.jsonl"), rows("held_out.jsonl")]
    pictures = [{row["references"][0] for row in part} for part in parts]
    assert len(pictures[0]) == 4
    assert pictures[0] == pictures[1]
    assert not {row["id"] for row in parts[0]} & {row["id"] for row in parts[1]}
    shutil.rmtree("my-dog")
    for name in "abcd":
        shutil.copyfile(photos / f"{name}.jpg", photos / f"{name}-copy.jpg")
    photo(30, (96, 96)).save(photos / "z.jpg")
    assert main(init()) == 0
    assert {row["references"][0] for row in rows("held_out.jsonl")} == {"photos/09-z.png"}


def test_photos_are_copied_upright_and_without_their_exif(photos: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Camera"
    tall = photo(20, (120, 90))
    tall.save(photos / "Größe (1).jpg", exif=exif, quality=95)
    before = {path.name: path.read_bytes() for path in photos.iterdir()}
    assert main(init("--model", "flux-kontext")) == 0
    (copy,) = Path("my-dog/photos").glob("*gr*")
    assert re.fullmatch(r"\d\d-[a-z0-9-]+\.png", copy.name)
    with Image.open(copy) as image:
        assert image.size == (90, 120)
        assert not image.getexif()
    assert {path.name: path.read_bytes() for path in photos.iterdir()} == before
    shutil.rmtree("my-dog")
    assert main(init("--model", "embedded")) == 0
    with Image.open(copy) as image:
        assert image.size == (90, 90)  # the only shape that the small model knows


def test_what_is_printed_leads_on(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "notes.txt").write_text("any")
    assert main(init()) == 0
    out = capsys.readouterr().out
    assert out.startswith("project: my-dog\n  model: embedded, to try every step here; for ")
    assert "\n  photos: 10, 2 of them kept aside" in out
    assert "  notes.txt: not used: a text" in out
    assert "prompts say 'animal': it does not know 'dog'" in out
    commands = [shlex.split(line) for line in out.splitlines() if line.startswith("    cgrpo ")]
    assert [words[1] for words in commands] == [
        "data", "doctor", "train", "train", "watch", "generate", "evaluate", "export"
    ]  # fmt: skip
    generate = commands[5]
    reference = generate[generate.index("--reference") + 1]
    first = rows("held_out.jsonl")[0]
    assert generate[generate.index("--prompt") + 1] == first["prompt"]
    assert reference == f"my-dog/{first['references'][0]}"
    assert Path(reference).exists()
    header = Path("my-dog/config.yaml").read_text()
    assert f"cgrpo train {photos.parent}/my-dog/config.yaml" in header
    assert main(commands[0][1:]) == 0
    assert Path("my-dog/data.png").exists()
    assert capsys.readouterr().err == "next: cgrpo train my-dog/config.yaml\n"


def test_large_models_print_what_has_to_be_done_once(photos: Path, capsys) -> None:
    assert main(init("--model", "flux-kontext-24gb", "--num-prompts", "300")) == 0
    assert len(rows("held_out.jsonl")) == 120
    out = capsys.readouterr().out
    for text in ("customized-grpo[bitsandbytes]", "FLUX.1-Kontext-dev", "hf auth login"):
        assert text in out
    assert "cgrpo estimate my-dog/config.yaml\n" in out
    assert "cgrpo train my-dog/config.yaml --rehearse\n" in out
    assert "measure what training changed, on 64 held-out examples" in out
    assert "prompts are those for a thing (for a person or an animal: --live)" in out


def test_own_prompts(photos: Path) -> None:
    lines = [f"a {{class}} and {n} pebbles" for n in range(11)]
    Path("prompts.txt").write_text("\n".join([*lines, "Rex at home"]))
    assert main(init("--prompts", "prompts.txt")) == 0
    parts = [rows(f"{name}.jsonl") for name in ("train", "validation", "held_out")]
    everything = {row["prompt"] for part in parts for row in part}
    assert everything == {*(f"an animal and {n} pebbles" for n in range(11)), "Rex at home"}


def test_odd_paths_and_prompts_can_be_pasted(photos: Path, capsys) -> None:
    assert main(["init", "my dog's", "--photos", "photos", "--class", "dog"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "cgrpo data" in line)
    assert main(shlex.split(line)[1:]) == 0
    assert load_config("my dog's/config.yaml").name == "my-dog-s"
    lines = [f"-a {{class}} and {n} pebbles" for n in range(11)]
    Path("prompts.txt").write_text("\n".join(lines))
    assert main(init("--prompts", "prompts.txt")) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "cgrpo generate" in line)
    prompt = rows("held_out.jsonl")[0]["prompt"]
    assert prompt.startswith("-an animal")
    assert _parse(shlex.split(line)[1:])[0].prompt == [prompt]
    following = map(str, after_training(load_config("my-dog/config.yaml"), Path("run")))
    assert _parse([*following])[0].prompt == [prompt]


def test_the_sheet_says_what_becomes_of_a_photo(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(project_module, "save_grid", lambda path, sheet, *_: seen.extend(sheet))
    photo(9, (48, 48)).save(photos / "z.png")
    assert main(init()) == 0
    assert len(seen) == 11
    for number, (name, example) in enumerate(zip("abcdefghijz", seen, strict=True), start=1):
        copy, _, says = example.prompt.partition(": ")
        assert copy == f"{number:02d}-{name}"
        assert Path(f"my-dog/photos/{copy}.png").exists()
        assert says.split(", ")[0] in ("to train on", "kept aside to judge by")
    assert seen[-1].prompt.endswith(", small")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--num-prompts", "14"], "--num-prompts must be from 15 to 600, got 14"),
        (["--num-prompts", "0"], "--num-prompts: must be a whole number from 1"),
        (["--model", "flux"], "--model: invalid choice: 'flux'"),
        (["--gpu-memory", "16"], "--gpu-memory must be at least 24"),
        (["--gpu-memory", "nan"], "--gpu-memory: must be a number of GB above 0, got 'nan'"),
        (["--gpu-memory", "80GB"], "--gpu-memory: must be a number of GB above 0, got '80GB'"),
        (["--gpu-memory", "24", "--model", "uno"], "for a GPU of 80 GB, got --gpu-memory 24; take"),
        (["--prompts", "p.txt", "--num-prompts", "20"], "--num-prompts must be left out with --pr"),
        (["--prompts", "p.txt", "--live", "--model", "uno"], "--live must be left out"),
        (["--prompts", "p.txt"], "--prompts: p.txt: cannot be read"),
        (["--llm", "http://127.0.0.1:1/v1"], "--llm-model must be given"),
        (["--llm-model", "m"], "--llm-model has no effect without --llm"),
        (["--llm", "http://127.0.0.1:1/v1", "--llm-model", "m"], "--llm must be left out with the"),
        (["--class", ""], "--class must be"),
        (["--photos", "nowhere"], "--photos must be a folder, got 'nowhere'"),
    ],
)
def test_a_mistake_gets_one_line_and_writes_nothing(photos: Path, capsys, words, says) -> None:
    assert says in error_line(capsys, *init(*words))
    assert [path.name for path in photos.parent.iterdir()] == ["photos"]


def test_nothing_is_overwritten(photos: Path, capsys, monkeypatch) -> None:
    Path("my-dog").mkdir()
    Path("my-dog/mine.txt").write_text("mine")
    assert "which holds something; name another" in error_line(capsys, *init())
    assert [path.name for path in Path("my-dog").iterdir()] == ["mine.txt"]
    Path("my-dog/mine.txt").unlink()
    assert main(init()) == 0
    capsys.readouterr()
    shutil.rmtree("my-dog")
    Path("my-dog").mkdir()
    monkeypatch.chdir("my-dog")
    words = ["init", ".", "--photos", "../photos", "--class", "dog"]
    assert "must not be the folder you are in" in error_line(capsys, *words)


def test_what_lies_beside_the_project_stays(photos: Path) -> None:
    mine = [Path(f"my-dog{ending}/mine.txt") for ending in (".tmp", ".old")]
    for file in mine:
        file.parent.mkdir()
        file.touch()
    Path("my-dog").symlink_to("elsewhere")
    assert main(init()) == 0
    assert all(file.exists() for file in mine)
    names = {path.name for path in photos.parent.iterdir()}
    assert names == {"photos", "my-dog", "my-dog.tmp", "my-dog.old", "elsewhere"}
    assert Path("elsewhere/config.yaml").exists()
    assert load_config("my-dog/config.yaml").output_dir == f"{photos.parent}/my-dog/runs"


def test_a_failure_midway_leaves_nothing(photos: Path, monkeypatch) -> None:
    def fail(pixels: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(project_module, "png", fail)
    assert main(init()) == 2
    assert [path.name for path in photos.parent.iterdir()] == ["photos"]


def test_the_model_is_chosen_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {gb: choose_preset(None, gb).name for gb in (24, 40, 79, 80, 141)}
    assert chosen == {
        24: "flux2-klein-base", 40: "flux2-klein-base", 79: "flux2-klein-base",
        80: "flux-kontext", 141: "flux-kontext",
    }  # fmt: skip
    assert choose_preset("uno", None).name == "uno"
    with pytest.raises(ConfigError, match="take flux2-klein-base"):
        choose_preset("flux-kontext", 40)
    for total, name in ((25_300_000_000, "flux2-klein-base"), (8 * 10**9, "embedded")):
        card = type("Card", (), {"total_memory": total})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, card=card: card)
        assert choose_preset(None, None).name == name
