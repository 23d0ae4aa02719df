"""The judge tells copying, ignoring the prompt and damaged pictures apart from the ground truth."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, targets

from customized_grpo.config import RunConfig
from customized_grpo.data.emoji.source import EmojiSource
from customized_grpo.errors import ConfigError, RewardError
from customized_grpo.evaluation.judge import Judge
from customized_grpo.evaluation.outcome import Judgement
from customized_grpo.rewards.attributes import AttributeClassifier
from customized_grpo.types import Example

CPU = torch.device("cpu")
SOURCE = EmojiSource(seed=0)


@pytest.fixture(scope="module")
def held_out() -> list[Example]:
    return SOURCE.held_out(48)


@pytest.fixture
def judge(tiny_config: RunConfig, held_out: list[Example]) -> Judge:
    return Judge(tiny_config, held_out, SOURCE, CPU)


def test_ground_truth_copy_and_unrelated_pictures(judge: Judge, held_out: list[Example]) -> None:
    truth = judge(targets(held_out))
    copy = judge(torch.stack([e.references[0] for e in held_out]))
    unrelated = judge(targets(held_out).roll(1, 0))
    assert_near(truth.means["copy"], 0.0, scale=1)
    assert copy.means["copy"] > 0.5
    assert abs(unrelated.means["copy"]) < 0.1
    for name in ("copy_gap", "reward/copy_gap"):  # without the truth they say the same
        assert abs(truth.means[name]) < 0.1 < 0.3 < copy.means[name]
        assert abs(unrelated.means[name]) < 0.1
    assert_near(copy.means["dinov2"], 1.0)
    assert copy.means["clip-text"] < 0.2 < 0.7 < truth.means["clip-text"]
    assert list(truth.columns)[:4] == ["prompt_right", "subject_right", "both_right", "copies"]
    assert truth.means["subject"] > unrelated.means["subject"] + 0.1
    assert truth.numbers["frechet"] == pytest.approx(0, abs=1e-6)
    assert copy.numbers["frechet"] > 0.01
    for name in ("scene", "placement", "prop", "color", "accessory"):
        assert truth.means[f"attribute/{name}"] > 0.9, name
    assert copy.means["attribute/scene"] == 0


@pytest.mark.slow
def test_what_no_reward_sees_is_measured(judge: Judge, held_out: list[Example]) -> None:
    clean = targets(held_out)
    grid = clean.clone()
    grid[..., ::2, ::2] = (grid[..., ::2, ::2] + 0.15).clamp(0, 1)
    blurred = F.avg_pool2d(clean, 5, 1, 2)
    low, same, high = (judge(x).numbers["high_frequency"] for x in (blurred, clean, grid))
    assert low < 0.5
    assert same == pytest.approx(1)
    assert high > 1.2


@pytest.mark.slow
def test_attributes_that_were_not_asked_for_do_not_count(
    judge: Judge, held_out: list[Example]
) -> None:
    column = judge(targets(held_out)).tensors["attribute/color"]
    asked = torch.tensor([example.attributes["color"] != "none" for example in held_out])
    assert 0 < asked.sum() < len(held_out)
    assert torch.equal(column.isnan(), ~asked)


@pytest.mark.slow
def test_diversity_needs_variants(judge: Judge, held_out: list[Example]) -> None:
    images = targets(held_out)
    assert "diversity" not in judge(images).numbers
    assert_near(judge(images, [images[:8]] * 2).numbers["diversity"], 0.0, scale=1)
    assert judge(images, [images[:8].roll(1, 0)]).numbers["diversity"] > 0.1


def test_examples_without_ground_truth_get_what_can_be_said(
    tiny_config: RunConfig, held_out: list[Example]
) -> None:
    bare = [
        Example(id=e.id, prompt=e.prompt, references=e.references, subject=e.subject)
        for e in held_out[:3]
    ]
    evaluation = dataclasses.replace(tiny_config.evaluation, classifier=None)
    judgement = Judge(dataclasses.replace(tiny_config, evaluation=evaluation), bare, SOURCE, CPU)(
        targets(held_out[:3])
    )
    assert set(judgement.columns) == {
        "clip-text", "dinov2", "reward/preference", "reward/dinov2",
    }  # fmt: skip
    assert judgement.numbers == {}


def test_missing_values_are_nan_in_columns_and_left_out_of_means() -> None:
    judgement = Judgement(columns={"a": [1.0, None, 2.0]})
    assert judgement.tensors["a"].isnan().tolist() == [False, True, False]
    assert judgement.means == {"a": 1.5}


def test_pictures_may_have_another_size_than_the_examples(
    tiny_config: RunConfig, held_out: list[Example]
) -> None:
    wide = [dataclasses.replace(e, references=(F.pad(e.references[0], (8, 8)),),
                                reference_masks=None) for e in held_out[1:3]]  # fmt: skip
    judge = Judge(tiny_config, [held_out[0], *wide], SOURCE, CPU)
    assert judge.anchors()["copy"].means["dinov2"] > 0.5
    same = Judge(tiny_config, held_out[:4], SOURCE, CPU)
    larger = F.interpolate(targets(held_out[:4]), (96, 96), mode="bilinear")
    judgement = same(larger)
    assert judgement.means["subject_right"] > 0.5
    assert judgement.numbers["high_frequency"] > 0


@pytest.mark.parametrize("path", ["nowhere", "embedded:reward-clip"])
def test_wrong_classifiers_are_named(path: str) -> None:
    with pytest.raises(ConfigError, match=f"^evaluation.classifier: .*{path}") as caught:
        AttributeClassifier.load(path, CPU)
    assert "\n" not in str(caught.value)


class _Down:
    """A model that scores the first pictures only, and says why."""

    def __init__(self, scored: int) -> None:
        self.scored = scored

    def score(self, images: torch.Tensor, examples: list[Example]) -> torch.Tensor:
        places = torch.arange(len(images))
        return torch.where(places < self.scored, 0.5, torch.nan)

    def take_errors(self) -> tuple[str, ...]:
        return ("http://there: refused",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("_evaluators", "evaluators: none of 48 pictures could be scored; dinov2: http://there"),
        ("_rewards", "rewards: none of 48 pictures could be scored; dinov2: http://there: refus"),
    ],
)
def test_a_model_that_scores_nothing_ends_it_and_one_that_misses_some_is_named(
    judge: Judge,
    held_out: list[Example],
    caplog: pytest.LogCaptureFixture,
    models: str,
    message: str,
) -> None:
    asked = getattr(judge, models)
    place = asked.names.index("dinov2")
    asked._rewards[place] = _Down(0)
    with pytest.raises(RewardError, match=f"^{message}"):
        judge(targets(held_out))
    asked._rewards[place] = _Down(45)
    with caplog.at_level(logging.WARNING):
        assert judge(targets(held_out)).columns
    section = models.removeprefix("_")
    lost = f"{section}: 3 of 48 pictures have no score; dinov2: http://there: refused"
    assert lost in caplog.messages
