"""What is said of copying without a ground truth, in the emoji world, where there is one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny_models
import torch
from helpers import ROOT, assert_near, targets
from torch import Tensor

from customized_grpo.config import RewardConfig, load_config
from customized_grpo.data.emoji.source import EmojiSource
from customized_grpo.errors import RewardError
from customized_grpo.rewards.base import RewardSet
from customized_grpo.rewards.clip_image import ClipImageConfig
from customized_grpo.rewards.clip_text import ClipTextConfig
from customized_grpo.rewards.dinov2 import Dinov2Config
from customized_grpo.rewards.identity import IdentityReward
from customized_grpo.rewards.regions import Segmenter
from customized_grpo.types import Example

CPU = torch.device("cpu")
DINO = Dinov2Config(path="embedded:reward-dino", objective="identity")
LARGE = sorted(
    path.name
    for path in (ROOT / "configs").glob("*.yaml")
    if not path.name.startswith(("emoji", "uno-paper"))
)


@pytest.fixture(scope="module")
def world() -> list[Example]:
    return EmojiSource(seed=0).held_out(96)


def references(examples: list[Example]) -> Tensor:
    return torch.stack([e.references[0] for e in examples])


def is_identity(config: RewardConfig) -> bool:
    return config.objective == "identity"


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """Share of pairs in which the positive one is larger."""
    return (positive[:, None] > negative).float().mean().item()


def test_the_gap_is_its_formula(world: list[Example]) -> None:
    some, reward = world[:3], DINO.build(CPU)
    joined = dataclasses.replace(
        some[0],
        id="joined",
        references=tuple(e.references[0] for e in some),
        reference_masks=tuple(m for e in some for m in e.reference_masks or ()),
    )
    images = torch.cat([targets(some), references(some)])
    gaps = []
    for image in images:
        (output,) = reward.embed(image[None])
        each = []
        for picture, mask in zip(joined.references, joined.reference_masks or (), strict=True):
            bare = mask * picture + (1 - mask) * 0.5
            whole, without = reward.embed(torch.stack([picture, bare]))
            each.append(float(output @ whole) - float(output @ without))
        gaps.append(max(each))
    score, gap = reward.score_and_gap(images, [joined] * 6)
    assert_near(gap, torch.tensor(gaps), scale=1)
    assert torch.equal(score, reward.score(images, [joined] * 6))


@pytest.mark.parametrize(
    ("config", "least"),
    [
        (DINO, 0.92),
        (dataclasses.replace(DINO, path="embedded:evaluator-dino"), 0.96),
        (ClipImageConfig(path="embedded:evaluator-clip", objective="identity"), 0.97),
    ],
    ids=["reward-dino", "evaluator-dino", "evaluator-clip"],
)
def test_copies_are_told_from_faithful_pictures(
    world: list[Example], config: RewardConfig, least: float
) -> None:
    """Also copies that were moved or tinted; and a wrong subject is no copy."""
    reward = config.build(CPU)
    assert isinstance(reward, IdentityReward)

    def gap(images: Tensor) -> Tensor:
        return reward.score_and_gap(images.clamp(0, 1), world)[1]

    faithful, copy = gap(targets(world)), references(world)
    tint = torch.tensor([1.1, 0.95, 0.85]).view(1, 3, 1, 1)
    for copied in (copy, copy * tint, copy.flip(3)):
        assert area_under_curve(gap(copied), faithful) > least
    assert abs(faithful.mean()) < 0.15 * gap(copy).mean()
    mixed = gap(0.7 * copy + 0.3 * targets(world))
    assert faithful.mean() < mixed.mean() < gap(copy).mean()


class TrueMasks(Segmenter):
    """Finds what the world knows: no segmenter for emojis is at hand."""

    def __init__(self, masks: list[Tensor]) -> None:
        self._masks = masks

    def masks(self, images: object, subjects: object) -> list[Tensor]:
        """Of the examples, in their order."""
        return self._masks


def test_shipped_configs_do_not_reward_copying(world: list[Example]) -> None:
    """Their options on the embedded encoder: above a copy there is the subject as it was asked
    for."""
    embedded = DINO.build(CPU)

    def score(config: RewardConfig, images: Tensor, masks: list[Tensor]) -> Tensor:
        reward = IdentityReward(
            embedded._encode,
            embedded._preprocess,
            config,
            TrueMasks(masks),  # type: ignore
        )
        return reward.score(images, world)

    faithful = [e.target_mask for e in world if e.target_mask is not None]
    copied = [m for e in world for m in e.reference_masks or ()]
    runs = {name: load_config(ROOT / "configs" / name) for name in LARGE}
    rewards = {
        name: reward for name, run in runs.items() for reward in run.rewards if is_identity(reward)
    }
    assert rewards.keys() == runs.keys()
    for config in set(rewards.values()):
        above = score(config, targets(world), faithful) > score(config, references(world), copied)
        assert above.float().mean() > 0.9, [name for name in LARGE if rewards[name] == config]
    for name, run in runs.items():
        for evaluator in filter(is_identity, run.evaluators):
            assert (evaluator.region, evaluator.output_region) == ("subject", "subject"), name  # type: ignore
            assert evaluator.copy_penalty == 0, name  # type: ignore


def test_without_masks_it_is_not_known(world: list[Example], tmp_path: Path) -> None:
    bare = [dataclasses.replace(e, reference_masks=None) for e in world[:2]]
    assert RewardSet([DINO], CPU).score(targets(bare), bare).copy_gap.isnan().all()
    segmenter = tiny_models.save_clipseg(tmp_path)
    found = dataclasses.replace(DINO, region="subject", segmenter=segmenter)
    reward, mask = found.build(CPU), torch.zeros(1, 64, 64)
    mask[:, 20:50, 10:40] = 1
    reward._segmenter = TrueMasks([mask])
    masked = [dataclasses.replace(e, reference_masks=(mask,)) for e in bare]
    expected = DINO.build(CPU).score_and_gap(targets(bare), masked)[1]
    assert_near(reward.score_and_gap(targets(bare), bare)[1], expected, scale=1)


class _Down:
    def score(self, images: Tensor, examples: list[Example]) -> Tensor:
        return self.score_and_gap(images, examples)[0]

    def score_and_gap(self, images: Tensor, examples: list[Example]) -> tuple[Tensor, Tensor]:
        raise RewardError("down")


def test_the_first_reward_that_measures_it_is_asked(world: list[Example]) -> None:
    clip = ClipTextConfig(path="embedded:reward-clip", objective="prompt")
    other = dataclasses.replace(DINO, name="other", path="embedded:evaluator-dino")
    some, images = world[:4], references(world[:4])
    rewards = RewardSet([clip, DINO, other], CPU)
    own = DINO.build(CPU).score_and_gap(images, some)[1]
    assert torch.equal(rewards.score(images, some).copy_gap, own)
    rewards._rewards[1] = _Down()
    assert rewards.score(images, some).copy_gap.isnan().all()  # and not another model's numbers
    assert RewardSet([clip], CPU).score(images, some).copy_gap.isnan().all()


class _OnTheCpu:
    def score(self, images: Tensor, examples: list[Example]) -> Tensor:
        return self.score_and_gap(images, examples)[0]

    def score_and_gap(self, images: Tensor, examples: list[Example]) -> tuple[Tensor, Tensor]:
        numbers = torch.arange(len(images))
        return numbers, numbers.double()

    def embed(self, images: Tensor) -> Tensor:
        return torch.ones(len(images), 2, dtype=torch.float64)


def test_a_plug_may_answer_from_the_cpu_in_any_type(world: list[Example]) -> None:
    rewards = RewardSet([DINO], CPU)
    rewards._rewards[0] = _OnTheCpu()
    found = rewards.score(targets(world[:3]).to("meta"), world[:3])
    assert found.errors == ()
    encoder = rewards.embedder("identity")
    assert encoder is not None
    for column in (found.scores, found.copy_gap, encoder.embed(targets(world[:3]).to("meta"))):
        assert (column.device.type, column.dtype) == ("meta", torch.float32)
