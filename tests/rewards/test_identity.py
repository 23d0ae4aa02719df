"""Identity: references, regions, the copy penalty, the cache of features."""

from __future__ import annotations

import dataclasses
import gc
import logging
from pathlib import Path

import pytest
import tiny_models
import torch
from helpers import assert_near, targets
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPSegForImageSegmentation,
    DINOv3ViTModel,
    ViTImageProcessorPil,
)

from customized_grpo.config.decoding import decode
from customized_grpo.data.emoji.source import EmojiSource
from customized_grpo.errors import ConfigError
from customized_grpo.rewards import identity
from customized_grpo.rewards.base import RewardSet
from customized_grpo.rewards.clip_image import ClipImageConfig
from customized_grpo.rewards.clip_text import ClipTextConfig
from customized_grpo.rewards.dinov2 import Dinov2Config
from customized_grpo.rewards.dinov3 import Dinov3Config
from customized_grpo.rewards.identity import IdentityReward
from customized_grpo.rewards.regions import Segmenter, cut_out
from customized_grpo.types import Example

CPU = torch.device("cpu")
PATH = "embedded:reward-dino"


def dino(**options: object) -> IdentityReward:
    return Dinov2Config(path=PATH, objective="identity", **options).build(CPU)  # type: ignore


@pytest.fixture(scope="module")
def world() -> list[Example]:
    return EmojiSource(seed=0).held_out(24)


def test_features_for_evaluations_are_those_of_the_score(tmp_path: Path) -> None:
    """Cut out on both sides; by the segmenter where there is no mask."""
    (example,) = EmojiSource(seed=0).held_out(1)
    picture, words = example.references[0], example.subject
    images = torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(1))
    segmenter = tiny_models.save_clipseg(tmp_path)
    options = {"region": "subject", "output_region": "subject", "segmenter": segmenter}
    reward = dino(**options)
    for masks in (example.reference_masks, None):
        example = dataclasses.replace(example, reference_masks=masks)
        outputs = reward.embed_outputs(list(images), [words] * 3)
        photo = reward.embed_photos([picture], [masks and masks[0]], [words])
        expected = reward.score(images, [example] * 3)
        assert_near(outputs @ photo[0], expected, scale=1)
    empty = torch.zeros_like(picture[:1])
    assert reward.embed_photos([picture], [empty], [words]).isnan().all()


def merged(*examples: Example, masks: bool = True) -> Example:
    """One example with the references of several."""
    return Example(
        id="+".join(e.id for e in examples),
        prompt="x",
        references=tuple(r for e in examples for r in e.references),
        reference_masks=tuple(m for e in examples for m in e.reference_masks or ())
        if masks
        else None,
        subject=examples[0].subject,
    )


@torch.no_grad()
def test_dinov3_equals_transformers(tmp_path: Path) -> None:
    path = tiny_models.save_dinov3(tmp_path)
    images, references = torch.rand(2, 3, 3, 32, 32).unbind(0)
    model = DINOv3ViTModel.from_pretrained(path, dtype=torch.float32).eval()
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    features = [model((x - mean) / std).last_hidden_state[:, 0] for x in (images, references)]
    examples = [
        Example(id=str(i), prompt="", references=(r,), subject="") for i, r in enumerate(references)
    ]
    ours = Dinov3Config(path=path, objective="identity").build(CPU).score(images, examples)
    assert_near(ours, cosine_similarity(*features), scale=1)


@torch.no_grad()
def test_clip_image_equals_transformers(tmp_path: Path, world: list[Example]) -> None:
    path = tiny_models.save_clip(tmp_path)
    model = CLIPModel.from_pretrained(path, dtype=torch.float32).eval()
    processor = CLIPImageProcessorPil.from_pretrained(path)

    def embed(images: list[Tensor]) -> Tensor:
        bytes_ = [(image * 255).round().byte() for image in images]
        pixels = processor(bytes_, return_tensors="pt").pixel_values
        return model.visual_projection(model.vision_model(pixels).pooler_output)

    some = world[:4]
    outputs, references = list(targets(some)), [e.references[0] for e in some]
    plain = cosine_similarity(embed(outputs), embed(references))
    ours = ClipImageConfig(path=path, objective="identity").build(CPU)
    # PIL rounds the resize to 8 bits; the tiny model's features move by that much.
    torch.testing.assert_close(ours.score(targets(some), some), plain, atol=2e-3, rtol=0)


@pytest.mark.parametrize("how", ["max", "mean"])
@pytest.mark.parametrize("region", ["image", "subject"])
def test_several_references(world: list[Example], how: str, region: str) -> None:
    reward, images = dino(references=how, region=region), targets(world[:3])
    single = torch.stack([reward.score(images, [e] * 3) for e in world[:3]])
    expected = single.amax(0) if how == "max" else single.mean(0)
    ours = reward.score(images, [merged(*world[:3])] * 3)
    assert_near(ours, expected, scale=1)


def slow_score(images: Tensor, examples: list[Example], weight: float, region: str) -> Tensor:
    """The formula of IdentityReward's docstring, one number at a time."""
    embed = dino().embed
    scores = []
    for image, example in zip(images, examples, strict=True):
        (whole,) = embed(image[None])
        similarity, excess = [], []
        for picture, mask in zip(example.references, example.reference_masks or (), strict=True):
            (reference,), (subject,) = embed(picture[None]), embed(cut_out(picture, mask)[None])
            target = reference if region == "image" else subject
            similarity.append(float(whole @ target))
            excess.append(max(0.0, float(whole @ reference) - float(subject @ reference)))
        scores.append(max(similarity) - weight * max(excess))
    return torch.tensor(scores)


@pytest.mark.parametrize("region", ["image", "subject"])
def test_copy_penalty_is_the_formula(world: list[Example], region: str) -> None:
    examples = [*world[:4], merged(world[4], world[5])]
    images = torch.cat([targets(world[:2]), torch.stack([e.references[0] for e in examples[2:]])])
    ours = dino(region=region, copy_penalty=0.7).score(images, examples)
    expected = slow_score(images, examples, 0.7, region)
    assert_near(ours, expected, scale=1)


def test_copies_pay_and_faithful_subjects_do_not(world: list[Example]) -> None:
    free, paid = dino(region="subject"), dino(region="subject", copy_penalty=1.0)
    copies = torch.stack([e.references[0] for e in world])

    def penalty(images: Tensor) -> Tensor:
        return free.score(images, world) - paid.score(images, world)

    assert penalty(copies).min() > 0.05
    assert penalty(targets(world)).mean() < 0.25 * penalty(copies).mean()
    for example in world[:4]:
        assert example.reference_masks is not None
        subject = cut_out(example.references[0], example.reference_masks[0])[None]
        gap = free.score(subject, [example]) - paid.score(subject, [example])
        assert_near(gap, torch.zeros(1), scale=1)


def test_an_empty_mask_spoils_its_example_only(
    world: list[Example], caplog: pytest.LogCaptureFixture
) -> None:
    empty = dataclasses.replace(
        world[0], id="empty", reference_masks=(torch.zeros_like(world[0].references[0][:1]),)
    )
    partly = merged(empty, world[1])
    images = targets(world[:3])
    for options in ({}, {"references": "mean"}, {"copy_penalty": 1.0}):
        reward = dino(region="subject", **options)
        with caplog.at_level(logging.WARNING, logger="customized_grpo"):
            ours = reward.score(images, [empty, partly, world[2]])
        rest = reward.score(images[1:], [world[1], world[2]])
        assert ours[0].isnan()
        assert_near(ours[1:], rest, scale=1)
    warnings = [r.getMessage() for r in caplog.records]
    assert warnings == ["example 'empty': no subject in reference 0; it is left out"] * 3


def test_references_are_encoded_once(world: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    reward, images = dino(region="subject", copy_penalty=1.0), targets(world[:6])
    batches: list[int] = []
    encode = reward._encode
    monkeypatch.setattr(
        reward, "_encode", lambda pixels: (batches.append(len(pixels)), encode(pixels))[1]
    )
    first = reward.score(images, world[:6])
    assert batches == [1] * 18 + [6]  # three pictures of each reference, then the outputs
    assert torch.equal(reward.score(images, world[:6]), first)
    renamed = [dataclasses.replace(e, id="other" + e.id, prompt="new") for e in world[:6]]
    assert torch.equal(reward.score(images, renamed), first)
    assert batches[18:] == [6, 6, 6]
    changed = dataclasses.replace(world[0], references=(world[1].references[0],))
    assert reward.score(images[:1], [changed]) != first[:1]
    assert batches[21:] == [1, 1, 1, 1]


def test_the_cache_is_bounded(world: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_CACHED", 3)
    reward, images = dino(), targets(world[:8])
    expected = dino().score(images, world[:8])
    assert torch.equal(reward.score(images, world[:8]), expected)
    assert len(reward._cache) == 3
    assert torch.equal(reward.score(images, world[:8]), expected)


@torch.no_grad()
def test_the_segmenter_is_clipseg(tmp_path: Path) -> None:
    path = tiny_models.save_clipseg(tmp_path)
    images = [torch.rand(3, *size).mul(255).round() / 255 for size in ((40, 40), (60, 44))]
    names = ["red dog", "cat"]
    masks = Segmenter.load(path, CPU).masks(images, names)
    model = CLIPSegForImageSegmentation.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer, processor = (
        AutoTokenizer.from_pretrained(path),
        ViTImageProcessorPil.from_pretrained(path),
    )
    for image, name, mask in zip(images, names, masks, strict=True):
        pixels = processor([(image * 255).byte()], return_tensors="pt").pixel_values
        logits = model(pixel_values=pixels, **tokenizer([name], return_tensors="pt")).logits
        plain = logits.view(1, 1, 40, 40)
        sized = torch.nn.functional.interpolate(plain, image.shape[1:], mode="bilinear")[0]
        assert mask.shape == (1, *image.shape[1:])
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert (mask == (sized > 0).float()).float().mean() > 0.98  # but for PIL's rounding


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What a segmenter finds, by subject; the subjects of the emoji world need a trained one."""
    masks: dict[str, Tensor] = {}
    monkeypatch.setattr(
        Segmenter, "masks", lambda self, images, subjects: [masks[name] for name in subjects]
    )
    return masks


def test_regions_of_outputs(world: list[Example], found: dict[str, Tensor], tmp_path: Path) -> None:
    clipseg = tiny_models.save_clipseg(tmp_path)
    some, images = world[:3], targets(world[:3])
    for example in some:
        assert example.target_mask is not None
        found[example.subject] = example.target_mask
    found[some[2].subject] = torch.zeros_like(found[some[2].subject])
    ours = dino(region="subject", output_region="subject", segmenter=clipseg)
    whole = dino(region="subject")
    cut = torch.cat([
        whole.score(cut_out(image, found[e.subject])[None], [e])
        for e, image in zip(some[:2], images, strict=False)
    ])  # fmt: skip
    scores = ours.score(images, some)
    assert_near(scores[:2], cut, scale=1)
    # Nothing found: the whole output counts, so that leaving the subject out is no way out.
    assert_near(scores[2:], whole.score(images[2:], some[2:]), scale=1)


def test_references_without_masks_are_segmented(
    world: list[Example], found: dict[str, Tensor], tmp_path: Path
) -> None:
    clipseg = tiny_models.save_clipseg(tmp_path)
    bare = [dataclasses.replace(e, reference_masks=None) for e in world[:3]]
    for example in world[:3]:
        assert example.reference_masks is not None
        found[example.subject] = example.reference_masks[0]
    ours = dino(region="subject", segmenter=clipseg).score(targets(world[:3]), bare)
    expected = dino(region="subject").score(targets(world[:3]), world[:3])
    assert_near(ours, expected, scale=1)


def identity_section(cls: type, **options: object) -> dict:
    path = f"{cls.__module__}:{cls.__qualname__}"
    return {"type": path, "objective": "identity", "path": PATH} | options


def run_with(reward: dict) -> dict:
    return {
        "name": "x",
        "data": {"type": "emoji"},
        "generator": {"type": "flux-kontext", "path": "x"},
        "rewards": [reward, {"type": "clip-text", "objective": "prompt", "path": "x"}],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_region": "subject"}, "segmenter must be given"),
        ({"segmenter": "a/b"}, "segmenter must be null where nothing is cut out"),
        ({"copy_penalty": -1}, "copy_penalty must be greater than or equal to 0"),
        ({"references": "min"}, "references must be 'max' or 'mean'"),
        ({"region": "object"}, "region must be 'image' or 'subject'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [Dinov2Config, Dinov3Config, ClipImageConfig])
def test_options_are_checked(cls: type, options: dict, message: str) -> None:
    run = run_with(identity_section(cls, **options))
    with pytest.raises(ConfigError, match=r"rewards\.0") as caught:
        decode(run, "run.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_segmenter_is_named(world: list[Example]) -> None:
    with pytest.raises(ConfigError, match=r"^segmenter: 'nobody/seg' is not a CLIPSeg"):
        dino(region="subject", segmenter="nobody/seg")


def test_rewards_share_the_weights_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_models.save_clip(tmp_path)
    loads: list[str] = []
    load = CLIPModel.from_pretrained
    monkeypatch.setattr(
        CLIPModel,
        "from_pretrained",
        lambda folder, **options: (loads.append(folder), load(folder, **options))[1],
    )
    text = ClipTextConfig(path=path, objective="prompt")
    image = ClipImageConfig(path=path, objective="identity")
    rewards = RewardSet([text, image, dataclasses.replace(image, name="b")], CPU)
    assert loads == [path]
    del rewards
    gc.collect()
    text.build(CPU)
    assert loads == [path, path]  # nothing is kept when nobody uses it
