"""Shares of right pictures: of truths, copies, other subjects and pictures that miss something."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from helpers import ROOT, targets
from torch import Tensor

from customized_grpo.config import load_config
from customized_grpo.data.emoji.source import EmojiSource
from customized_grpo.data.emoji.world import Attributes, EmojiWorld, attribute_values
from customized_grpo.rewards.attributes import AttributeClassifier
from customized_grpo.rewards.base import ImageEmbedder, RewardSet
from customized_grpo.rewards.regions import cut_outs
from customized_grpo.rewards.truth import SHARES, Truth
from customized_grpo.types import Example

CPU = torch.device("cpu")
SOURCE = EmojiSource(seed=0)
HELD_OUT = SOURCE.held_out(40)


@cache
def models() -> tuple[ImageEmbedder, AttributeClassifier]:
    config = load_config(ROOT / "configs" / "emoji.yaml")
    encoder = RewardSet(config.evaluators, CPU, "evaluators").embedder("identity")
    assert encoder is not None
    assert config.evaluation.classifier is not None
    return encoder, AttributeClassifier.load(config.evaluation.classifier, CPU)


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(HELD_OUT, SOURCE, *models(), CPU)


def means(columns: dict[str, Tensor]) -> dict[str, float]:
    return {name: column.nanmean().item() for name, column in columns.items()}


def redrawn(examples: list[Example], subject: Tensor | None = None, **changes: int) -> Tensor:
    """The examples' targets in scenes of their own, with another subject or other attributes."""
    world = EmojiWorld("held_out")
    names = [s.name for s in world.subjects]
    wanted = {
        field.name: torch.tensor(
            [attribute_values(field.name).index(e.attributes[field.name]) for e in examples]
        )
        for field in dataclasses.fields(Attributes)
    }
    wanted |= {name: torch.full((len(examples),), value) for name, value in changes.items()}
    if subject is None:
        subject = torch.tensor([names.index(e.subject) for e in examples])
    rng = torch.Generator().manual_seed(5)
    return world.render(subject, Attributes(**wanted), rng)[0]


def test_truths_are_right_and_no_copies(truth: Truth) -> None:
    columns = truth(targets(HELD_OUT))
    assert tuple(columns)[:4] == SHARES
    found = means(columns)
    assert found["prompt_right"] > 0.9
    assert found["subject_right"] == 1
    assert found["both_right"] == found["prompt_right"]
    assert found["copies"] == 0
    assert found["subject"] > 0.98


def test_another_scene_of_the_same_kind_is_as_right(truth: Truth) -> None:
    found = means(truth(redrawn(HELD_OUT)))
    assert found["prompt_right"] > 0.9
    assert found["subject_right"] == 1


def test_references_are_copies_and_wrong(truth: Truth) -> None:
    found = means(truth(torch.stack([e.references[0] for e in HELD_OUT])))
    assert found["copies"] == 1
    assert found["prompt_right"] == found["both_right"] == 0
    assert found["subject_right"] < 0.6  # where no colour is asked for and it stands there already


def test_another_subject_is_wrong_and_the_prompt_still_right(truth: Truth) -> None:
    others = EmojiWorld("held_out").indices
    own = [s.name for s in EmojiWorld("held_out").subjects]
    places = torch.tensor([own.index(e.subject) for e in HELD_OUT])
    next_one = others[(torch.searchsorted(others, places) + 1) % len(others)]
    found = means(truth(redrawn(HELD_OUT, next_one)))
    assert found["subject_right"] < 0.1
    assert found["prompt_right"] > 0.85
    assert found["both_right"] < 0.1


@pytest.mark.parametrize("name", ["prop", "color", "accessory"])
def test_what_is_missed_makes_a_prompt_wrong_where_it_was_asked_for(
    truth: Truth, name: str
) -> None:
    asked = torch.tensor([e.attributes[name] != "none" for e in HELD_OUT])
    right = truth(redrawn(HELD_OUT, **{name: 0}))["prompt_right"]
    assert right[asked].mean() < 0.3  # some are of that colour by themselves
    assert right[~asked].mean() > 0.85


def test_what_is_not_asked_for_cannot_be_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, nan = models()[1], torch.nan
    hits = {"a": torch.tensor([1.0, 1.0, 0.0, nan]), "b": torch.tensor([nan, 0.0, nan, nan])}
    monkeypatch.setattr(classifier, "hits", lambda images, examples: hits)
    columns = Truth(HELD_OUT[:4], SOURCE, None, classifier, CPU)(targets(HELD_OUT[:4]))
    assert columns["prompt_right"].tolist() == [1, 0, 0, 1]


def test_portraits_stand_for_renderings_as_the_prompt_asks() -> None:
    """The slow way: every subject in the example's own scene, with all it asks for."""
    examples = HELD_OUT[:6]
    encoder, classifier = models()
    images = torch.cat(
        [redrawn(examples[:2]), redrawn(examples[2:4], color=3), redrawn(examples[4:], accessory=5)]
    )
    fast = Truth(examples, SOURCE, encoder, classifier, CPU)(images)
    world = EmojiWorld("held_out")
    masks = [e.target_mask for e in examples if e.target_mask is not None]
    outputs = encoder.embed(cut_outs(images, masks))
    for row, example in enumerate(examples):
        wanted = {
            field.name: torch.full_like(
                world.indices, attribute_values(field.name).index(example.attributes[field.name])
            )
            for field in dataclasses.fields(Attributes)
        }
        pictures = world.render(world.indices, Attributes(**wanted), torch.Generator())
        similarity = encoder.embed(cut_outs(*pictures)) @ outputs[row]
        names = [world.subjects[i].name for i in world.indices.tolist()]
        own = names.index(example.subject)
        assert fast["subject"][row].item() == pytest.approx(similarity[own].item(), abs=0.1)
        assert fast["subject_right"][row] == (similarity.argmax() == own)


def test_validation_is_as_hard_as_held_out() -> None:
    examples = SOURCE.validation(24)
    sizes = {len(set(SOURCE.rivals(e))) for e in (*examples, *HELD_OUT)}
    assert sizes == {96}
    assert {SOURCE.rivals(e) for e in examples}.isdisjoint({SOURCE.rivals(HELD_OUT[0])})
    own = [e.subject in SOURCE.rivals(e) for e in examples]
    assert 0 < sum(own) < len(own)
    columns = Truth(examples, SOURCE, *models(), CPU)(targets(examples))
    assert columns["subject_right"].mean() > 0.9
    assert columns["copies"].sum() == 0


def test_data_that_know_less_get_less() -> None:
    encoder, classifier = models()
    columns = Truth(HELD_OUT[:4], object(), encoder, classifier, CPU)(targets(HELD_OUT[:4]))
    assert [name for name in columns if "/" not in name] == ["prompt_right", "copies"]
    columns = Truth(HELD_OUT[:4], SOURCE, None, classifier, CPU)(targets(HELD_OUT[:4]))
    assert [name for name in columns if "/" not in name] == ["prompt_right"]
    bare = [dataclasses.replace(e, target=None, target_mask=None) for e in HELD_OUT[:4]]
    assert Truth(bare, SOURCE, encoder, None, CPU)(targets(HELD_OUT[:4])) == {}


def test_several_references_count_by_the_one_that_was_copied() -> None:
    doubled = [
        dataclasses.replace(e, references=(torch.rand(3, 64, 64), *e.references))
        for e in HELD_OUT[:4]
    ]
    columns = Truth(doubled, SOURCE, *models(), CPU)
    assert columns(torch.stack([e.references[0] for e in HELD_OUT[:4]]))["copies"].mean() == 1
