import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from customized_grpo.buckets import RATIOS, bucket_for, layout, nearest_ratio
from customized_grpo.types import crop_and_resize

sides = st.integers(32, 6000)


@pytest.mark.parametrize(
    ("size", "area", "multiple", "bucket"),
    [
        ((512, 512), 512 * 512, 16, (512, 512)),
        ((100, 100), 1024 * 1024, 16, (1024, 1024)),
        ((3000, 4000), 1024 * 1024, 16, (880, 1184)),
        ((4000, 3000), 1024 * 1024, 16, (1184, 880)),
        ((1080, 1920), 512 * 512, 32, (384, 672)),
        ((64, 64), 64 * 64, 16, (64, 64)),
        ((500, 5000), 64 * 64, 64, (64, 128)),
    ],
)
def test_known_buckets(size, area, multiple, bucket) -> None:
    assert bucket_for(*size, area, multiple) == bucket


@given(sides, sides, st.sampled_from([256, 512, 1024]), st.sampled_from([8, 16, 32]))
def test_sides_are_multiples_and_the_area_is_about_what_was_asked_for(h, w, side, multiple) -> None:
    tall, wide = bucket_for(h, w, side * side, multiple)
    assert tall % multiple == wide % multiple == 0
    # Each side is off by half a multiple at most; the short one of 7:3 is side / sqrt(7 / 3).
    slack = (1 + multiple / 2 / (side / math.sqrt(7 / 3))) ** 2
    assert 1 / slack < tall * wide / side**2 < slack


@given(st.integers(300, 700), st.just(700))
def test_at_most_an_eighth_and_a_bit_is_cropped_away(short, long) -> None:
    for h, w in ((short, long), (long, short)):
        kept = min(h / w / RATIOS[nearest_ratio(h, w)], RATIOS[nearest_ratio(h, w)] / (h / w))
        assert kept >= math.sqrt(3 / 4) - 1e-9


@given(sides, sides, sides, sides)
def test_pictures_of_one_layout_share_every_bucket(h1, w1, h2, w2) -> None:
    settings = [(512 * 512, 16), (1024 * 1024, 32), (768 * 768, 64), (64 * 64, 16)]
    same = layout([(h1, w1)]) == layout([(h2, w2)])
    if same:
        assert all(bucket_for(h1, w1, *s) == bucket_for(h2, w2, *s) for s in settings)
    else:
        assert bucket_for(h1, w1, 1024**2, 16) != bucket_for(h2, w2, 1024**2, 16)


@given(sides, sides)
def test_turning_a_picture_turns_its_bucket(h, w) -> None:
    assert bucket_for(h, w, 512 * 512, 16) == bucket_for(w, h, 512 * 512, 16)[::-1]


def test_layout_is_the_number_and_the_ratios_of_the_references() -> None:
    assert layout([(100, 100), (300, 200)]) == layout([(64, 60), (1500, 1000)]) == (4, 6)
    assert layout([(300, 200), (100, 100)]) != layout([(100, 100), (300, 200)])


def test_a_picture_is_cropped_in_the_middle_and_not_distorted() -> None:
    image = torch.zeros(3, 200, 300)
    image[:, 90:110, 140:160] = 1  # a square stays one
    bucket = bucket_for(200, 300, 96 * 96, 16)
    small = crop_and_resize(image, *bucket)[0] > 0.5
    rows, columns = small.any(1).nonzero()[:, 0], small.any(0).nonzero()[:, 0]
    assert bucket == (80, 112)
    assert abs(len(rows) - len(columns)) <= 1
    assert rows.float().mean() == pytest.approx(39.5, abs=0.6)
    assert columns.float().mean() == pytest.approx(55.5, abs=0.6)
