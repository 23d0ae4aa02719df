"""`cgrpo data`: what will be trained on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT
from PIL import Image

from customized_grpo.cli.main import main
from customized_grpo.config import load_config
from customized_grpo.data.folder import FolderConfig
from customized_grpo.data.images import check_pictures
from customized_grpo.errors import DataError
from customized_grpo.types import Example

BASE = yaml.safe_load((ROOT / "configs" / "emoji.yaml").read_text())
FOLDER = "customized_grpo.data.folder:FolderConfig"


def config(folder: Path, **data: object) -> str:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(BASE | {"data": data}))
    return str(file)


def test_counts_shapes_prompts_and_a_picture(tmp_path: Path, capsys, caplog) -> None:
    (tmp_path / "rex").mkdir()
    for i, size in enumerate([(60, 40), (61, 40), (40, 40)]):
        Image.new("RGB", size, "red").save(tmp_path / "rex" / f"{i}.png")
    out = tmp_path / "new" / "sheet.png"
    file = config(tmp_path, type=FOLDER, path=str(tmp_path / "rex"), num_references=2)
    assert main(["data", file, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert caplog.messages[0] == "reading data: folder"  # of many pictures it takes minutes
    assert lines[:2] == ["training: 45 examples", "held out: 15, validation: 15"]
    assert lines[3:6] == [
        "  3:2 + 3:2: 15 examples",
        "  3:2 + 1:1: 15 examples",
        "  1:1 + 3:2: 15 examples",
    ]
    assert lines[6] == "rex ('rex'): 3 photos"
    prompts = lines[8 : 8 + BASE["rollout"]["prompts_per_rollout"]]
    assert all("rex" in prompt for prompt in prompts)
    assert lines[-1] == f"picture: {out}"
    with Image.open(out) as sheet:
        reds = sum(count for count, color in sheet.getcolors(2**20) if color == (255, 0, 0))
    assert reds >= 2 * len(prompts) * 144 * 96  # both references of every example


def test_a_picture_that_is_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.png").write_bytes(b"mine")
    assert (
        main(["data", config(tmp_path, type="customized_grpo.data.emoji.source:EmojiConfig")]) == 0
    )
    assert capsys.readouterr().out.endswith("picture: data-2.png\n")
    assert Path("data.png").read_bytes() == b"mine"


def test_an_endless_source(tmp_path: Path, capsys) -> None:
    type_ = "customized_grpo.data.emoji.source:EmojiConfig"
    assert main(["data", config(tmp_path, type=type_), "--out", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.startswith("examples: without end\nfirst batch:\n")


def test_mistakes_are_one_line_and_leave_no_picture(tmp_path: Path, capsys) -> None:
    file = config(tmp_path, type=FOLDER, path=str(tmp_path / "none"))
    assert main(["data", file, "--out", str(tmp_path / "a.png")]) == 2
    assert "error: data.path: must be a folder" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def write_examples(folder: Path, prompts: list[str], size: tuple[int, int] = (60, 40)) -> dict:
    Image.new("RGB", size, "red").save(folder / "rex.png")
    file = folder / "rows.jsonl"
    rows = [{"prompt": prompt, "references": ["rex.png"]} for prompt in prompts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"type": "jsonl", "path": str(file), "held_out": str(file)}


def test_prompts_that_a_model_reads_in_part_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(["a dog on a very long beach with many small stones"] * 4)
    data = write_examples(tmp_path, ["a dog", long, f"{long} at night", "a cat"])
    assert main(["data", config(tmp_path, **data), "--out", str(tmp_path / "a.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "4 examples, 1 pictures, 0 masks" in lines[4]
    (generator,) = [line for line in lines if line.startswith("generator: ")]
    (reward,) = [line for line in lines if line.startswith("rewards.preference: ")]
    assert "reads 30 tokens of a prompt; 2 of 4 prompts are longer" in generator
    assert "reads 32 tokens of a prompt; 2 of 4 prompts are longer" in reward
    assert "'a dog on a very long beach with" in reward


@pytest.mark.parametrize("plug", ["clip-text", "pickscore", "generator"])
def test_the_limit_is_where_words_stop_to_matter(plug: str) -> None:
    """Of the loaded models: at the limit the last word counts, and one token later it does not."""
    cpu = torch.device("cpu")
    limit, read = plugs()[plug].text_limit(), reader(plug, cpu)
    assert limit is not None
    for extra, matters in ((0, True), (1, False)):
        # The last word and the end token are the last two.
        words = ["a"] * 200
        while limit.count([" ".join([*words, "red"])])[0] > limit.most + extra:
            words.pop()
        texts = [" ".join([*words, last]) for last in ("red", "blue")]
        assert limit.count(texts) == [limit.most + extra] * 2
        one, other = map(read, texts)
        assert torch.equal(one, other) != matters


def plugs() -> dict[str, Any]:
    raw = load_config(ROOT / "configs" / "emoji.yaml")
    found = {plug.type: plug for plug in (*raw.rewards, *raw.evaluators)}
    return found | {"generator": raw.generator}


def reader(plug: str, device: torch.device) -> Callable[[str], torch.Tensor]:
    """What a model makes of a text."""
    built = plugs()[plug].build(device)
    if plug != "generator":
        return lambda text: built._encoder.texts([text])

    def encode(text: str) -> torch.Tensor:
        example = Example(id="a", prompt=text, subject="", references=(torch.zeros(3, 64, 64),))
        with torch.no_grad():
            return built._encode_text(example)[0]["encoder_hidden_states"]

    return encode


def test_pictures_that_lose_much_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_examples(tmp_path, ["a dog", "a cat"], size=(3000, 200))
    assert main(["data", config(tmp_path, **data), "--out", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "cropped: 1 pictures lose more than 25% of a side, rex.png the most, 8" in out


@pytest.mark.usefixtures("without_heic")
def test_what_lies_in_a_folder_and_is_not_used_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for subject in ("rex", "mug"):
        for number in range(2):
            path = tmp_path / "photos" / subject / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (60, 40), "red").save(path)
    rex = tmp_path / "photos" / "rex"
    for name in ("IMG_1.HEIC", "IMG_2.heic", "a.CR2", "film.MOV", "2.txt", "notes.xyz", ".hidden"):
        (rex / name).write_bytes(b"any")
    (rex / "more").mkdir()
    Image.new("L", (60, 40)).save(rex / "gone.mask.png")
    file = config(tmp_path, type=FOLDER, path=str(tmp_path / "photos"))
    assert main(["data", file, "--out", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("rex ")]
    assert line.startswith("rex ('rex'): 2 photos; ")
    assert "2 not used, such as IMG_1.HEIC: HEIC, which needs the extra [heic]; install it" in line
    for words in ("a.CR2: a camera's raw", "film.MOV: a film", "2.txt: a text", "notes.xyz: no pi"):
        assert words in line
    assert "more: not looked into" in line
    assert "gone.mask.png: a mask without a photo of its name" in line
    assert "hidden" not in line
    assert "mug ('mug'): 2 photos\n" in out


@pytest.mark.usefixtures("without_heic")
def test_a_folder_of_what_is_no_photo_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "rex").mkdir()
    with pytest.raises(DataError, match="at least one photo, got none; add some"):
        FolderConfig(path=str(tmp_path)).build(0)
    (tmp_path / "rex" / "IMG_1.HEIC").write_bytes(b"any")
    with pytest.raises(DataError, match=r"got none, but IMG_1\.HEIC \(HEIC, which needs the extra"):
        FolderConfig(path=str(tmp_path)).build(0)


@pytest.mark.usefixtures("without_heic")
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99, r"HEIC and needs the extra \[heic\]"),
        (b"\0\0\0\x18ftypisom" + b"\0" * 99, "a film"),
        (b"", "empty"),
        (b"%PDF-1.7", "a PDF"),
    ],
)
def test_a_file_that_was_renamed_is_named_for_what_it_is(
    tmp_path: Path, content: bytes, kind: str
) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.jpg is {kind}, whatever its name says; save it as"):
        check_pictures({(file, "RGB"): "x"})


def test_twelve_bits_in_sixteen_are_refused(tmp_path: Path) -> None:
    shades = np.linspace(0, 4095, 40 * 60).reshape(40, 60).astype(np.uint16)
    Image.fromarray(shades).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="must use its 16 bits, got at most 4095 of 65,535"):
        check_pictures({(tmp_path / "a.png", "RGB"): "x"})
    Image.fromarray(shades * 16).save(tmp_path / "a.png")
    check_pictures({(tmp_path / "a.png", "RGB"): "x"})
