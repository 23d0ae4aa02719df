"""Several subjects in one picture, on pictures whose right matching is known."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from helpers import assert_near
from torch import Tensor

from customized_grpo.errors import DataError
from customized_grpo.rewards.dinov2 import Dinov2Config
from customized_grpo.rewards.endpoints.wire import Limits, decode_request, encode_request
from customized_grpo.rewards.identity import IdentityReward
from customized_grpo.rewards.matching import matched, regions
from customized_grpo.rewards.preprocess import Preprocessing
from customized_grpo.types import Example

COLOURS = {"a red dog": (1.0, 0.0, 0.0), "a blue cat": (0.0, 0.0, 1.0)}
RED, BLUE = COLOURS
LEFT, MIDDLE, RIGHT = 4, 26, 48
OTHER = -1 / 3  # the cosine of red and blue, as seen from grey


def picture(*subjects: tuple[str, int]) -> Tensor:
    """Squares of subjects on grey ``[3, 64, 64]``, each from a column on."""
    canvas = torch.full((3, 64, 64), 0.5)
    for name, left in subjects:
        canvas[:, 20:32, left : left + 12] = torch.tensor(COLOURS[name])[:, None, None]
    return canvas


def in_colour(image: Tensor) -> Tensor:
    return ((image - 0.5).abs().amax(0, keepdim=True) > 0.1).float()


class Exact:
    """Finds what the words say."""

    def masks(self, images: Sequence[Tensor], subjects: Sequence[str]) -> list[Tensor]:
        found = []
        for image, name in zip(images, subjects, strict=True):
            colour = torch.tensor(COLOURS[name])[:, None, None]
            found.append(((image - colour).abs().amax(0, keepdim=True) < 0.1).float())
        return found


class Coarse:
    """Finds every subject whatever the words say, as two animals are alike to CLIPSeg."""

    def masks(self, images: Sequence[Tensor], subjects: Sequence[str]) -> list[Tensor]:
        return [in_colour(image) for image in images]


def mean_colour(pixels: Tensor) -> Tensor:
    return (pixels - 0.5).mean((2, 3)).mul(1e4).round()  # grey is 0, whatever its rounding


def reward(finder: object, **options: Any) -> IdentityReward:
    fields = {"region": "subject", "output_region": "subject", "segmenter": "x"} | options
    config = Dinov2Config(path="x", objective="identity", **cast(Any, fields))
    plain = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3, fit="exact", size=(32, 32))
    return IdentityReward(mean_colour, plain, config, cast(Any, finder))


def example(*subjects: str, **fields: Any) -> Example:
    references = [picture((name, MIDDLE)) for name in subjects]
    made = Example(
        id="+".join(subjects), prompt="both", references=tuple(references),
        subject=" and ".join(dict.fromkeys(subjects)), reference_subjects=subjects,
        reference_masks=tuple(map(in_colour, references)),
    )  # fmt: skip
    return dataclasses.replace(made, **fields)


def score(judge: IdentityReward, asked: Example, *shown: tuple[str, int]) -> float:
    return judge.score(picture(*shown)[None], [asked]).item()


@pytest.mark.parametrize("segmenter", [Exact(), Coarse()], ids=["exact", "coarse"])
def test_swapped_subjects_are_right_and_missing_or_doubled_ones_are_not(segmenter: object) -> None:
    judge, both = reward(segmenter), example(RED, BLUE)
    right = score(judge, both, (RED, LEFT), (BLUE, RIGHT))
    assert right == pytest.approx(1, abs=1e-5)
    assert score(judge, both, (BLUE, LEFT), (RED, RIGHT)) == pytest.approx(right, abs=1e-6)
    assert score(judge, both, (RED, LEFT)) == pytest.approx(0.5, abs=1e-5)
    doubled = score(judge, both, (RED, LEFT), (RED, RIGHT))
    assert doubled == pytest.approx((1 + OTHER) / 2, abs=1e-5)
    crowd = score(judge, both, (RED, LEFT), (RED, MIDDLE), (BLUE, RIGHT))
    assert crowd == pytest.approx(2 / 3, abs=1e-5)
    assert abs(score(judge, both)) < 1e-5


def test_each_subject_has_references_of_its_own() -> None:
    """Two of one subject and one of the other: pooled within a subject, and each counts once."""
    pale = picture((RED, MIDDLE)) * 0.5 + 0.25 * torch.tensor([0.0, 2.0, 2.0])[:, None, None]
    asked = example(RED, RED, BLUE)
    references = (asked.references[0], pale, asked.references[2])
    asked = dataclasses.replace(asked, references=references)
    shown = (RED, LEFT), (BLUE, RIGHT)
    assert score(reward(Exact()), asked, *shown) == pytest.approx(1, abs=1e-5)
    alone = dataclasses.replace(
        asked, references=(pale,), reference_subjects=(), subject=RED,
        reference_masks=(asked.reference_masks or ())[1:2], id="pale",
    )  # fmt: skip
    like_pale = score(reward(Exact()), alone, (RED, LEFT))
    assert like_pale < 0.99
    mean = score(reward(Exact(), references="mean"), asked, *shown)
    assert mean == pytest.approx(((1 + like_pale) / 2 + 1) / 2, abs=1e-5)


def test_references_without_masks_are_found_by_the_words_of_each() -> None:
    judge, asked = reward(Exact()), example(RED, BLUE)
    bare = dataclasses.replace(asked, reference_masks=None, id="bare")
    images = torch.stack([picture((RED, LEFT)), picture((RED, LEFT), (BLUE, RIGHT))])
    assert_near(judge.score(images, [bare] * 2), judge.score(images, [asked] * 2), scale=1)


def test_a_subject_that_no_reference_shows_is_left_out() -> None:
    asked = example(RED, BLUE)
    masks = (torch.zeros(1, 64, 64), *(asked.reference_masks or ())[1:])
    asked = dataclasses.replace(asked, reference_masks=masks)
    shown = (RED, LEFT), (BLUE, RIGHT)
    assert score(reward(Exact()), asked, *shown) == pytest.approx(1, abs=1e-5)
    nothing = dataclasses.replace(asked, reference_masks=(masks[0],) * 2)
    assert reward(Exact()).score(picture(*shown)[None], [nothing]).isnan().all()


@pytest.mark.parametrize("copy_penalty", [0.0, 2.0])
def test_one_subject_scores_beside_several_what_it_scores_alone(copy_penalty: float) -> None:
    judge = reward(Exact(), copy_penalty=copy_penalty)
    both, one = example(RED, BLUE), example(BLUE, reference_subjects=())
    images = torch.stack([picture((BLUE, LEFT)), picture((RED, LEFT)), picture((BLUE, RIGHT))])
    alone, gap = judge.score_and_gap(images[1:], [one] * 2)
    several, _ = judge.score_and_gap(images[:1], [both])
    mixed, gaps = judge.score_and_gap(images, [both, one, one])
    assert torch.equal(mixed, torch.cat([several, alone]))
    assert torch.equal(gaps[1:], gap)


def test_without_a_segmenter_several_subjects_are_refused() -> None:
    judge = reward(None, output_region="image", segmenter=None)
    with pytest.raises(DataError, match=r"^example .*: subjects: must be one for output_region"):
        score(judge, example(RED, BLUE), (RED, LEFT))


def test_the_matching_is_the_best_of_all() -> None:
    random = torch.Generator().manual_seed(0)
    for count, places in itertools.product(range(1, 5), range(1, 6)):
        table = torch.rand(count, places, generator=random)
        if count <= places:
            every = itertools.permutations(range(places), count)
            sums = [sum(table[i, j] for i, j in enumerate(chosen)) for chosen in every]
        else:
            every = itertools.permutations(range(count), places)
            sums = [sum(table[i, j] for j, i in enumerate(chosen)) for chosen in every]
        assert_near(matched(table, count), max(sums) / max(count, places))  # pyright: ignore


def test_noise_is_no_region() -> None:
    mask = in_colour(picture((RED, LEFT), (BLUE, RIGHT)))
    speck = mask.clone()
    speck[:, 60:63, 30:33] = 1
    assert len(regions([mask])) == len(regions([speck, mask])) == 2
    assert regions([torch.zeros(1, 64, 64)]) == []


def test_a_server_is_told_which_reference_shows_which_subject() -> None:
    asked = example(RED, BLUE)
    images = picture((RED, LEFT), (BLUE, RIGHT))[None]
    _, sent, (got,) = decode_request(encode_request("x", images, [asked]), Limits())
    assert got.subjects == asked.subjects
    judge = reward(Exact())
    assert torch.equal(judge.score(sent, [got]), judge.score(images, [asked]))
    one = example(RED, reference_subjects=())
    assert b"reference_subjects" not in encode_request("x", images, [one])
