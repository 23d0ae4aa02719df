"""A whole evaluation: its numbers against plain code, what it exposes, what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from data.pictures import DREAMBENCH, on_the_dataset
from helpers import assert_near
from PIL import Image
from rewards import tiny_models
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, Dinov2Model, DINOv3ViTModel, ViTModel
from worlds import config_of, smooth, write_jsonl, write_outputs, write_png

from customized_grpo.config import EmojiSet, RewardConfig
from customized_grpo.config.names import COPY, ORACLE, RANDOM
from customized_grpo.data.emoji.source import EmojiSource
from customized_grpo.errors import ConfigError, DataError, RewardError
from customized_grpo.evaluation.benchmark import evaluate_benchmark
from customized_grpo.evaluation.items import BenchmarkSet, Item
from customized_grpo.evaluation.outcome import Outcome
from customized_grpo.evaluation.report.gallery import chosen
from customized_grpo.evaluation.sets import build_set
from customized_grpo.rewards.dual_encoder import load_clip
from customized_grpo.rewards.preprocess import Preprocessing
from customized_grpo.types import Example

DINO = "customized_grpo.rewards.dino:DinoConfig"
EMOJI_CLIP = {"type": "clip-text", "objective": "prompt", "path": "embedded:evaluator-clip"}
EMOJI_DINO = {"type": "dinov2", "objective": "identity", "path": "embedded:evaluator-dino"}


def evaluate(*arguments: Any, **fields: Any) -> Outcome:
    outcome = evaluate_benchmark(config_of(*arguments, **fields))
    assert outcome is not None
    return outcome


def own_set(folder: Path, num_images: int = 1) -> BenchmarkSet:
    if not (folder / "prompts.jsonl").exists():
        write_jsonl(folder)
    return build_set(config_of(folder, [EMOJI_CLIP]).benchmark, num_images)


def close(column: Tensor, expected: Sequence[float]) -> None:
    assert_near(column, list(expected), scale=1)


def read(path: Path) -> Tensor:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def test_prompts_that_a_metric_reads_in_part_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_png(tmp_path / "rex.png", smooth(0))
    prompts = ["a dog", " ".join(["a dog on the beach"] * 20)]
    rows = [{"subject": "rex", "prompt": text, "references": ["rex.png"]} for text in prompts]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_outputs(tmp_path / "outputs", own_set(tmp_path), lambda item: smooth(1))
    evaluate(tmp_path, [EMOJI_CLIP])
    assert "metrics.clip-text: reads 32 tokens of a prompt; 1 of 2 prompts are" in caplog.text


class Plain:
    """Features by the libraries' models, one picture at a time, straight from the files."""

    def __init__(self, kind: str, path: str) -> None:
        classes = {"dino": ViTModel, "dinov2": Dinov2Model, "dinov3": DINOv3ViTModel}
        self.kind, self.path = kind, path
        self.model = classes.get(kind, CLIPModel).from_pretrained(path)

    def pixels(self, image: Tensor) -> Tensor:
        if self.kind != "dino":
            return Preprocessing.from_pretrained(self.path)(image[None])
        height, width = image.shape[1:]  # what DINO's own evaluation does
        short = min(height, width)
        resized = torch.nn.functional.interpolate(
            image[None], (256 * height // short, 256 * width // short), mode="bicubic",
            antialias=True, align_corners=False,
        ).clamp(0, 1)  # fmt: skip
        top, left = (resized.shape[2] - 224) // 2, (resized.shape[3] - 224) // 2
        cut = resized[:, :, top : top + 224, left : left + 224]
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return (cut - mean[None, :, None, None]) / std[None, :, None, None]

    @torch.no_grad()
    def feature(self, image: Tensor) -> Tensor:
        pixels = self.pixels(image)
        if self.kind == "clip-image":
            found = self.model.get_image_features(pixel_values=pixels).pooler_output
        elif self.kind == "dino":
            found = self.model(pixels).last_hidden_state[:, 0]
        else:
            found = self.model(pixels).pooler_output
        return torch.nn.functional.normalize(found[0].double(), dim=0)

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        tokens = AutoTokenizer.from_pretrained(self.path)([prompt], return_tensors="pt")
        found = self.model.get_text_features(input_ids=tokens["input_ids"]).pooler_output
        return torch.nn.functional.normalize(found[0].double(), dim=0)


def pictures_of(folder: Path, wanted: BenchmarkSet) -> list[Tensor]:
    outputs = folder / "outputs" / "pictures"
    return [read(outputs / f"{number:04d}.png") for number in range(len(wanted.items))]


@pytest.mark.parametrize(
    ("kind", "type_", "save"),
    [
        ("dino", DINO, tiny_models.save_dino),
        ("dinov2", "dinov2", tiny_models.save_dinov2),
        ("dinov3", "dinov3", tiny_models.save_dinov3),
        ("clip-image", "clip-image", tiny_models.save_clip),
    ],
)
def test_identity_equals_a_plain_implementation(tmp_path, kind, type_, save) -> None:
    wanted = own_set(tmp_path, num_images=2)
    write_outputs(tmp_path / "outputs", wanted, lambda i: smooth(7 * i.prompt_index + i.index))
    path = save(tmp_path / "model")
    metric = {"type": type_, "name": "m", "objective": "identity", "path": path}
    found = evaluate(tmp_path, [metric], num_images=2)
    plain = Plain(kind, path)
    outputs = [plain.feature(image) for image in pictures_of(tmp_path, wanted)]
    photos = {
        name: [plain.feature(read(tmp_path / photo.name)) for photo in subject.photos]
        for name, subject in wanted.subjects.items()
    }
    expected: dict[str, list[float]] = {"reference": [], "photos": [], "copy": [], "diversity": []}
    for item, output in zip(wanted.items, outputs, strict=True):
        similar = [float(output @ photo) for photo in photos[item.subject]]
        expected["reference"].append(similar[0])
        expected["photos"].append(sum(similar) / len(similar))
        rest = similar[1:]
        expected["copy"].append(similar[0] - sum(rest) / len(rest) if rest else math.nan)
        twin = wanted.items.index(replace(item, index=1 - item.index))
        expected["diversity"].append(1 - float(output @ outputs[twin]))
    for name, values in expected.items():
        close(found.own.tensors[f"m/{name}"], values)
    close(found.yardstick.anchors[COPY].tensors["m/reference"], [1.0] * len(wanted.items))


def test_clip_t_equals_a_plain_implementation(tmp_path: Path) -> None:
    """Of the whole prompt; also under another prompt, and of the anchor."""
    wanted = own_set(tmp_path)
    write_outputs(tmp_path / "outputs", wanted, lambda i: smooth(7 * i.prompt_index))
    path = tiny_models.save_clip(tmp_path / "model")
    metrics = [
        {"type": "clip-text", "name": "t", "objective": "prompt", "path": path},
        {"type": "pickscore", "objective": "prompt", "path": path, "processor": path},
    ]
    found = evaluate(tmp_path, metrics)
    plain = Plain("clip-image", path)
    images = [plain.feature(image) for image in pictures_of(tmp_path, wanted)]
    own, specific, copies = [], [], []
    for item, image in zip(wanted.items, images, strict=True):
        prompts = [i.prompt for i in wanted.items if i.subject == item.subject]
        other = prompts[(prompts.index(item.prompt) + 1) % len(prompts)]
        own.append(float(image @ plain.text(item.prompt)))
        specific.append(own[-1] - float(image @ plain.text(other)))
        photo = plain.feature(read(tmp_path / item.references[0]))
        copies.append(float(photo @ plain.text(item.prompt)))
    close(found.own.tensors["t"], own)
    close(found.own.tensors["t/specific"], specific)
    close(found.yardstick.anchors[COPY].tensors["t"], copies)
    scale = plain.model.logit_scale.exp().item()
    close(found.own.tensors["pickscore"] / scale, own)


def test_the_subject_region_is_what_is_compared(tmp_path: Path) -> None:
    """Masks lie beside the photos; what is around the subject changes nothing."""
    wanted = own_set(tmp_path)
    write_outputs(tmp_path / "outputs", wanted, lambda i: smooth(i.prompt_index))
    path = tiny_models.save_dinov2(tmp_path / "model")
    metric = {"type": "dinov2", "objective": "identity", "path": path, "region": "subject"}
    with pytest.raises(DataError, match="needs a mask for every photo, got none"):
        evaluate(tmp_path, [metric])
    mask = torch.zeros(3, 40, 48)
    mask[:, 10:30, 12:36] = 1
    for photo in wanted.photos:
        write_png(tmp_path / photo.name.replace(".png", ".mask.png"), mask)
    one = evaluate(tmp_path, [metric])
    for photo in wanted.photos:
        pixels = read(tmp_path / photo.name)
        write_png(tmp_path / photo.name, torch.where(mask > 0, pixels, 1 - pixels))
    two = evaluate(tmp_path, [metric])
    close(two.own.tensors["dinov2/photos"], one.own.tensors["dinov2/photos"].tolist())
    assert one.origin.digest != two.origin.digest


@pytest.mark.slow
@on_the_dataset
def test_anchors_on_the_real_photos_are_ordered(tmp_path: Path) -> None:
    benchmark = {"type": "dreambench", "path": str(DREAMBENCH)}
    wanted = build_set(config_of(tmp_path, [EMOJI_DINO], benchmark=benchmark).benchmark, 1)
    write_outputs(tmp_path / "outputs", wanted, lambda i: smooth(i.prompt_index, 32, 32))
    dino, clip = tiny_models.save_dino(tmp_path / "dino"), tiny_models.save_clip(tmp_path / "clip")
    metrics = [
        {"type": DINO, "name": "dino", "objective": "identity", "path": dino},
        {"type": "clip-image", "objective": "identity", "path": clip},
    ]
    found = evaluate(tmp_path, metrics, benchmark=benchmark, batch_size=64)
    assert (found.origin.counts["photos"], len(found.yardstick.items)) == (158, 750)
    for label in ("dino", "clip-image"):
        for name in ("reference", "photos"):
            copy, oracle, random = (
                found.models[anchor].means[f"{label}/{name}"] for anchor in (COPY, ORACLE, RANDOM)
            )
            assert copy >= oracle > random, (label, name)
        assert found.models[COPY].means[f"{label}/copy"] > 0.01
    text = (tmp_path / "evaluations" / "test" / "benchmark.md").read_text()
    assert "| Customized-GRPO | 0.812 | 8.32 |" in text
    assert "Published (not measured here)" in text


def emoji_set(count: int) -> BenchmarkSet:
    return build_set(EmojiSet(num_examples=count), num_images=1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """The truth, a copier, and a model that shows the subject whatever the prompt says."""
    folder = tmp_path_factory.mktemp("planted")
    count = 48
    wanted, examples = emoji_set(count), EmojiSource(0).held_out(count)

    def truth(item: Item) -> Tensor:
        target = examples[item.prompt_index].target
        assert target is not None
        return target

    def copier(item: Item) -> Tensor:
        return wanted.references(item)[0].picture.load()

    def ignorer(item: Item) -> Tensor:
        views = [p for p in wanted.subjects[item.subject].photos if p.name.startswith("view")]
        return views[item.prompt_index % len(views)].picture.load()

    outcomes: dict[str, Outcome] = {}
    for name, image in {"truth": truth, "copier": copier, "ignorer": ignorer}.items():
        write_outputs(folder / name, wanted, image)
        baseline = None if name == "truth" else str(folder / "evaluations" / "truth")
        outcomes[name] = evaluate(
            folder,
            [EMOJI_CLIP, EMOJI_DINO],
            name=name,
            benchmark={"type": "emoji", "num_examples": count},
            images=str(folder / name),
            baseline=baseline,
            cache=str(folder / "cache"),
        )
    return outcomes


def test_a_copier_is_exposed(planted: dict[str, Outcome]) -> None:
    copier, truth = planted["copier"], planted["truth"]
    assert_near(copier.summary["dinov2/reference"].mean, 1.0)
    copying, honest = (o.summary["dinov2/copy"] for o in (copier, truth))
    oracle = copier.yardstick.summary(copier.models[ORACLE])["dinov2/copy"]
    assert copying.low > max(oracle.high, honest.high)
    assert copier.changes["dinov2/copy"].low > 0


def test_a_prompt_ignorer_is_exposed(planted: dict[str, Outcome]) -> None:
    ignorer, truth = planted["ignorer"], planted["truth"]
    for name in ("clip-text", "clip-text/specific"):
        assert ignorer.changes[name].high < 0, name
    # Hardly better by its own prompt than by another.
    specific, honest = (o.summary["clip-text/specific"].mean for o in (ignorer, truth))
    assert abs(specific) < 0.15 * honest
    # Identity alone would praise it.
    assert ignorer.summary["dinov2/photos"].mean > truth.summary["dinov2/photos"].mean
    assert ignorer.summary["joint/domination"].mean == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstLetterConfig(RewardConfig):
    """CLIP-T behind the reference code's bug: a string where a list of prompts is expected."""

    type: Literal["first-letter"] = "first-letter"  # pyright: ignore
    fixed: bool = False

    def build(self, device: torch.device) -> FirstLetter:
        return FirstLetter(load_clip("embedded:evaluator-clip", device), self.fixed)


class FirstLetter:
    def __init__(self, encoder, fixed: bool) -> None:
        self._encoder, self._fixed = encoder, fixed

    @torch.no_grad()
    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        scores = []
        for image, example in zip(images, examples, strict=True):
            prompts = [example.prompt] if self._fixed else example.prompt  # the bug
            (text,) = self._encoder.texts([prompts[0]])
            scores.append(self._encoder.images(image[None])[0] @ text)
        return torch.stack(scores)


def test_a_first_letter_bug_is_caught(tmp_path: Path) -> None:
    wanted = emoji_set(12)
    write_outputs(tmp_path / "outputs", wanted, lambda i: smooth(i.prompt_index, 64, 64))
    metric = {"type": "test_benchmark:FirstLetterConfig", "objective": "prompt"}
    fields = {"benchmark": {"type": "emoji", "num_examples": 12}}
    with pytest.raises(RewardError, match="first-letter: must depend on the whole prompt, got the"):
        evaluate(tmp_path, [metric], **fields)
    assert not (tmp_path / "evaluations" / "test" / "benchmark.json").exists()
    found = evaluate(tmp_path, [metric | {"fixed": True}, EMOJI_CLIP], **fields)
    close(found.own.tensors["first-letter"], found.own.tensors["clip-text"].tolist())


def test_the_baseline_is_paired_picture_by_picture(tmp_path: Path) -> None:
    wanted = own_set(tmp_path)
    clip = EMOJI_CLIP | {"path": tiny_models.save_clip(tmp_path / "clip")}
    metrics = [clip, EMOJI_DINO | {"path": tiny_models.save_dinov2(tmp_path / "dino")}]
    write_outputs(tmp_path / "outputs", wanted, lambda i: smooth(5 * i.prompt_index))
    base = evaluate(tmp_path, metrics, name="base")
    write_outputs(tmp_path / "outputs", wanted, lambda i: smooth(9 + i.prompt_index))
    folder = str(tmp_path / "evaluations" / "base")
    found = evaluate(tmp_path, metrics, name="tuned", baseline=folder)
    own, other = (
        {n: o.own.tensors[n] for n in ("clip-text", "dinov2/photos")} for o in (found, base)
    )
    differences = found.yardstick.differences(found.own)
    for name, column in own.items():
        close(differences[name], (column - other[name]).tolist())
        assert found.changes[name].mean == pytest.approx(
            (column - other[name]).mean().item(), abs=1e-6
        )
    chance = [
        found.yardstick.anchors[COPY].tensors["clip-text"].mean().item(),
        found.yardstick.anchors[RANDOM].tensors["dinov2/photos"].mean().item(),
    ]
    sides = [column.mean().item() - c for column, c in zip(own.values(), chance, strict=True)]
    area = sides[0] * sides[1] if min(sides) > 0 else 0.0
    assert found.yardstick.hypervolume(found.own) == pytest.approx(area, abs=1e-6)
    written = json.loads((tmp_path / "evaluations" / "tuned" / "benchmark.json").read_text())
    change = written["statistics"]["changes"]["clip-text"]["mean"]
    assert change == pytest.approx(found.changes["clip-text"].mean, abs=1e-6)
    # The same of every group, from its pictures alone.
    red = [row for row, item in enumerate(found.yardstick.items) if item.category == "property"]
    assert len(red) == 3
    group = written["groups"]["category"]["property"]
    for name, column in own.items():
        assert group["models"]["tuned"]["means"][name]["mean"] == pytest.approx(
            column[red].mean().item(), abs=1e-6
        )
        change = (column - other[name])[red].mean().item()
        assert group["changes"][name]["mean"] == pytest.approx(change, abs=1e-6)
    copies = found.yardstick.anchors[COPY].tensors["clip-text"][red].mean().item()
    assert group["models"][COPY]["means"]["clip-text"]["mean"] == pytest.approx(copies, abs=1e-6)
    assert set(written["groups"]["kind"]) == {"live", "object"}
    text = (tmp_path / "evaluations" / "tuned" / "benchmark.md").read_text()
    assert "tuned - baseline" in text
    assert text.count("| random other subject | base (baseline) | tuned |") == 1 + 3 + 2
    # What cannot be compared is refused.
    fields = {"num_images": 2, "images": str(tmp_path / "two")}
    write_outputs(tmp_path / "two", own_set(tmp_path, 2), lambda i: smooth(i.index))
    with pytest.raises(ConfigError, match="baseline: must be of the same benchmark, got 'base'"):
        evaluate(tmp_path, metrics, name="two", baseline=folder, **fields)
    changed = [metrics[0], metrics[1] | {"path": "embedded:reward-dino"}]
    with pytest.raises(ConfigError, match="metric 'dinov2' must be measured by the same model"):
        evaluate(tmp_path, changed, name="other", baseline=folder)
    with pytest.raises(ConfigError, match="baseline: must be the folder of a finished evaluation"):
        evaluate(tmp_path, metrics, name="other", baseline=str(tmp_path))


def test_a_result_whose_pictures_are_lost_is_none(tmp_path: Path) -> None:
    wanted = own_set(tmp_path)
    folder = write_outputs(tmp_path / "outputs", wanted, lambda i: smooth(i.prompt_index))
    evaluate(tmp_path, [EMOJI_DINO])
    results = tmp_path / "evaluations" / "test"
    before = (results / "benchmark.json").read_bytes()
    with pytest.raises(ConfigError, match="baseline: must be another evaluation than this one"):
        evaluate(tmp_path, [EMOJI_DINO], baseline=str(results))
    with pytest.raises(DataError, match="cannot be read"):
        evaluate(tmp_path, [EMOJI_DINO], benchmark={"type": "jsonl", "path": "nowhere.jsonl"})
    assert (results / "benchmark.json").read_bytes() == before  # a slip costs nothing
    lost = (folder / "pictures" / "0004.png").rename(tmp_path / "lost.png")
    with pytest.raises(DataError, match="1 of 9 pictures are missing"):
        evaluate(tmp_path, [EMOJI_DINO])
    assert not (results / "benchmark.json").exists()
    lost.rename(folder / "pictures" / "0004.png")
    evaluate(tmp_path, [EMOJI_DINO])
    assert (results / "benchmark.json").read_bytes() == before


def test_a_photo_without_a_subject_ends_it(tmp_path: Path) -> None:
    wanted = own_set(tmp_path)
    write_outputs(tmp_path / "outputs", wanted, lambda i: smooth(i.prompt_index))
    for name in ("rex/0", "rex/1", "rex/2", "mug/0", "mug/1", "bob/0"):
        mask = torch.zeros(3, 40, 48)
        mask[:, 10:30, 10:30] = float(name != "mug/1")
        write_png(tmp_path / f"{name}.mask.png", mask)
    metric = EMOJI_DINO | {"region": "subject"}
    with pytest.raises(RewardError, match=r"dinov2: mug/1\.png .*no subject is found"):
        evaluate(tmp_path, [metric])
    assert not (tmp_path / "evaluations" / "test" / "benchmark.json").exists()


def test_a_partial_evaluation_says_so_everywhere(tmp_path: Path) -> None:
    wanted = own_set(tmp_path)
    folder = write_outputs(tmp_path / "outputs", wanted, lambda i: smooth(i.prompt_index))
    whole = evaluate(tmp_path, [EMOJI_CLIP], name="whole").own.tensors["clip-text/specific"]
    lines = (folder / "manifest.jsonl").read_text().splitlines(keepends=True)
    (folder / "manifest.jsonl").write_text("".join(lines[1:]))
    results = tmp_path / "evaluations" / "test"
    found = evaluate(tmp_path, [EMOJI_CLIP, EMOJI_DINO], allow_partial=True)
    close(found.own.tensors["clip-text/specific"], whole[1:].tolist())  # by the same other prompts
    written = json.loads((results / "benchmark.json").read_text())
    assert written["complete"] is False
    assert written["origin"]["missing"] == ["rex, prompt 0, reference rex/0.png, index 0"]
    assert "**PARTIAL: 1 of 9 pictures are missing" in (results / "benchmark.md").read_text()
    assert "PARTIAL: 1 of 9 pictures are missing" in (results / "gallery.html").read_text()
    (folder / "manifest.jsonl").write_text("".join(lines))
    with pytest.raises(ConfigError, match="baseline: must be complete, got 'test' with pictures"):
        evaluate(tmp_path, [EMOJI_DINO], name="other", baseline=str(results))


def test_a_picture_that_breaks_in_the_middle_ends_it(tmp_path: Path) -> None:
    """Its header is whole, so it is only found when it is decoded."""
    folder = write_outputs(tmp_path / "outputs", own_set(tmp_path), lambda i: smooth(i.index))
    file = folder / "pictures" / "0007.png"
    evaluate(tmp_path, [EMOJI_DINO])
    file.write_bytes(file.read_bytes()[:400])  # the earlier result is not that of these pictures
    with pytest.raises(DataError, match=r"0007\.png is not a readable picture"):
        evaluate(tmp_path, [EMOJI_DINO])
    assert [path.name for path in (tmp_path / "evaluations" / "test").iterdir()] == ["cache"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SometimesConfig(RewardConfig):
    type: Literal["sometimes"] = "sometimes"  # pyright: ignore
    never: bool = False

    def build(self, device: torch.device) -> SometimesConfig:
        return self

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        if self.never:
            raise RewardError("no answer")
        scores = images.mean((1, 2, 3))
        return torch.where(scores > scores.min(), scores, torch.nan)


def test_a_picture_that_cannot_be_scored_ends_it(tmp_path: Path) -> None:
    write_outputs(tmp_path / "outputs", own_set(tmp_path), lambda i: smooth(i.prompt_index))
    metric = {"type": "test_benchmark:SometimesConfig", "objective": "quality"}
    with pytest.raises(RewardError, match=r"sometimes: pictures/.*png could not be scored"):
        evaluate(tmp_path, [metric])
    with pytest.raises(RewardError, match="sometimes: no answer"):
        evaluate(tmp_path, [metric | {"never": True}])
    assert not (tmp_path / "evaluations" / "test" / "benchmark.json").exists()


def test_a_copy_penalty_is_no_metric(tmp_path: Path) -> None:
    write_outputs(tmp_path / "outputs", own_set(tmp_path), lambda i: smooth(i.prompt_index))
    with pytest.raises(ConfigError, match=r"metrics\.0\.copy_penalty: must be 0 in an evaluation"):
        evaluate(tmp_path, [EMOJI_DINO | {"copy_penalty": 1.0}])


def test_numbers_are_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second evaluation of the same pictures computes nothing; another picture, its chunk."""
    wanted = own_set(tmp_path)
    folder = write_outputs(tmp_path / "outputs", wanted, lambda i: smooth(i.prompt_index))
    evaluate(tmp_path, [EMOJI_DINO])
    cache = tmp_path / "evaluations" / "test" / "cache"
    files = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert len(files) == 2 + 3  # 6 photos, 9 pictures, 4 at a time
    first = (cache.parent / "benchmark.json").read_bytes()
    (folder / "pictures").rename(folder / "moved")
    manifest = folder / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("pictures/", "moved/"))
    evaluate(tmp_path, [EMOJI_DINO])
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == files
    assert (cache.parent / "benchmark.json").read_bytes() == first.replace(b"pictures/", b"moved/")
    write_png(folder / "moved" / "0000.png", smooth(77))
    evaluate(tmp_path, [EMOJI_DINO])
    assert len(list(cache.iterdir())) == 2 + 3 + 1


def test_the_gallery_is_one_file_by_a_rule(tmp_path: Path) -> None:
    values = torch.tensor([3.0, math.nan, 1, 2, 2, 5, 0, 9, 8, 7, 6, 4, 10, 11])
    rows = chosen(values)
    assert rows["worst"] == [6, 2, 3, 4, 0, 11]
    assert rows["best"] == [13, 12, 7, 8, 9, 10]
    assert rows["median"] == [4, 0, 11, 5, 10, 9]
    write_outputs(tmp_path / "outputs", own_set(tmp_path), lambda i: smooth(i.prompt_index))
    evaluate(tmp_path, [EMOJI_DINO])
    page = (tmp_path / "evaluations" / "test" / "gallery.html").read_text()
    assert page.count('<figure class="gallery">') == 18
    assert "http" not in page
