import random

import pytest
import torch

from customized_grpo.data.emoji.catalog import ACCESSORIES, PROPS
from customized_grpo.data.emoji.scenes import SCENES, paint_scenes
from customized_grpo.data.emoji.world import (
    COLORS,
    KINDS,
    Attributes,
    EmojiWorld,
    all_words,
    sample_attributes,
    write_prompt,
)


@pytest.fixture(scope="module")
def world() -> EmojiWorld:
    return EmojiWorld("train")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain(scene: int, placement: int, count: int = 1) -> Attributes:
    none = torch.zeros(count, dtype=torch.int64)
    return Attributes(
        scene=none + scene, placement=none + placement, prop=none, color=none, accessory=none
    )


def with_values(base: Attributes, **values: int) -> Attributes:
    columns = {
        name: getattr(base, name) for name in ("scene", "placement", "prop", "color", "accessory")
    }
    columns |= {name: torch.full_like(base.scene, value) for name, value in values.items()}
    return Attributes(**columns)


def test_subjects_are_many_and_split_by_subject(world: EmojiWorld) -> None:
    held_out = EmojiWorld("held_out")
    assert len(world.subjects) >= 600
    assert len(held_out.indices) >= 64
    assert not set(world.indices.tolist()) & set(held_out.indices.tolist())
    assert len(world.indices) + len(held_out.indices) == len(world.subjects)


def test_subjects_leave_out_props_accessories_and_signs(world: EmojiWorld) -> None:
    names = {subject.name for subject in world.subjects}
    assert len(names) == len(world.subjects)
    assert not names & {*PROPS.values(), *(a.emoji for a in ACCESSORIES.values())}
    assert not names & {"clock1", "new_moon", "de", "keycap_star", "red_circle", "heart"}


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'train' or 'held_out'"):
        EmojiWorld("test")


def test_the_same_seed_gives_the_same_batch(world: EmojiWorld) -> None:
    a, b, other = (world.sample(8, seeded(seed)) for seed in (3, 3, 4))
    assert a.prompts == b.prompts != other.prompts
    assert torch.equal(a.targets, b.targets)
    assert torch.equal(a.references, b.references)


def test_reference_shows_the_subject_plain_in_another_scene(world: EmojiWorld) -> None:
    batch = world.sample(64, seeded(0))
    border = torch.cat([batch.targets[:, :, 0], batch.references[:, :, 0]], 0).view(2, 64, 3, 64)
    assert ((border[0] - border[1]).abs().amax((1, 2)) > 0.02).all()


def test_scenes_vary_and_stay_in_range() -> None:
    scene = torch.arange(len(SCENES)).repeat_interleave(2)
    images = paint_scenes(scene, 64, seeded(1)).view(len(SCENES), 2, 3, 64, 64)
    assert images.min() >= 0
    assert images.max() <= 1
    assert ((images[:, 0] - images[:, 1]).abs().mean((1, 2, 3)) > 0.005).all()


@pytest.mark.parametrize("placement", [0, 1, 2])
def test_mask_is_where_the_subject_is(world: EmojiWorld, placement: int) -> None:
    subject = world.indices[:1]
    _, mask = world.render(subject, plain(0, placement), seeded(0))
    columns = mask[0, 0].amax(0).nonzero()[:, 0]
    left = {0: 16, 1: 0, 2: 32}[placement]
    assert columns.min() >= left
    assert columns.max() < left + 32


@pytest.mark.parametrize("attribute", ["prop", "color", "accessory"])
def test_every_value_of_an_attribute_changes_the_picture(world: EmojiWorld, attribute: str) -> None:
    count = {"prop": len(PROPS), "color": len(COLORS), "accessory": len(ACCESSORIES)}[attribute]
    subject, base = world.indices[:1], plain(2, 1)
    pictures = [
        world.render(subject, with_values(base, **{attribute: value}), seeded(0))[0]
        for value in range(count + 1)
    ]
    stacked = torch.cat(pictures).flatten(1)
    distance = torch.cdist(stacked, stacked) + 10 * torch.eye(count + 1)
    assert distance.min() > 0.5


def test_colour_changes_the_subject_only(world: EmojiWorld) -> None:
    subject, base = world.indices[:1], plain(5, 0)
    before, mask = world.render(subject, base, seeded(0))
    after, _ = world.render(subject, with_values(base, color=3), seeded(0))
    outside = mask == 0
    assert torch.equal(before * outside, after * outside)
    assert not torch.equal(before, after)


def test_prompts_say_everything_that_is_asked_for() -> None:
    scene = list(SCENES).index("on the beach")
    prop = list(PROPS).index("a mushroom") + 1
    color = list(COLORS).index("golden") + 1
    accessory = list(ACCESSORIES).index("sunglasses") + 1
    texts = {
        write_prompt("fox", (scene, 1, prop, color, accessory), random.Random(seed))
        for seed in range(40)
    }
    assert len(texts) > 8
    for text in texts:
        for words in ("a golden fox", "sunglasses", "a mushroom", "on the beach", "on the left"):
            assert words in text


def test_attributes_are_of_all_kinds() -> None:
    attributes = sample_attributes(400, seeded(0))
    asked = torch.stack([attributes.prop, attributes.color, attributes.accessory], 1) > 0
    kinds, counts = asked.unique(dim=0, return_counts=True)
    assert len(kinds) == len(KINDS)
    assert counts.min() > 60


def test_vocabulary_covers_the_grammar(world: EmojiWorld) -> None:
    words = set(all_words())
    for prompt in world.sample(300, seeded(7)).prompts:
        assert set(prompt.replace(",", "").split()) <= words
