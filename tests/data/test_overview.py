"""`cgrpo data`: what will be trained on."""

from pathlib import Path

import yaml
from helpers import ROOT
from PIL import Image

from customized_grpo.cli.main import main

BASE = yaml.safe_load((ROOT / "configs" / "emoji.yaml").read_text())
FOLDER = "customized_grpo.data.folder:FolderConfig"


def config(folder: Path, **data: object) -> str:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(BASE | {"data": data}))
    return str(file)


def test_counts_shapes_prompts_and_a_picture(tmp_path: Path, capsys) -> None:
    (tmp_path / "rex").mkdir()
    for i, size in enumerate([(60, 40), (61, 40), (40, 40)]):
        Image.new("RGB", size, "red").save(tmp_path / "rex" / f"{i}.png")
    out = tmp_path / "new" / "sheet.png"
    file = config(tmp_path, type=FOLDER, path=str(tmp_path / "rex"), num_references=2)
    assert main(["data", file, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
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


def test_an_endless_source(tmp_path: Path, capsys) -> None:
    type_ = "customized_grpo.data.emoji.source:EmojiConfig"
    assert main(["data", config(tmp_path, type=type_), "--out", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.startswith("examples: without end\nfirst batch:\n")


def test_mistakes_are_one_line_and_leave_no_picture(tmp_path: Path, capsys) -> None:
    file = config(tmp_path, type=FOLDER, path=str(tmp_path / "none"))
    assert main(["data", file, "--out", str(tmp_path / "a.png")]) == 2
    assert "error: data.path: must be a folder" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
