"""Batches of one layout, examples decoded on demand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from customized_grpo.buckets import layout
from customized_grpo.data.listed import Entry, ListedSource, PictureCache, Splits, check_entries
from customized_grpo.data.splits import split_by_subject
from customized_grpo.errors import ConfigError, DataError


class Blank:
    """A picture of which only the shape matters; counts how often it is read."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width, self.reads = height, width, 0

    def load(self) -> torch.Tensor:
        self.reads += 1
        return torch.zeros(3, self.height, self.width)


SHAPES = [(64, 64), (64, 96), (96, 64), (64, 128)]


def entries_of(sizes: tuple[int, ...]) -> list[Entry]:
    return [
        Entry(id=f"{group}-{i}", prompt="x", references=(Blank(*SHAPES[group]),))
        for group, size in enumerate(sizes)
        for i in range(size)
    ]


def source_of(*sizes: int, seed: int = 0) -> ListedSource:
    entries = entries_of(sizes)
    return ListedSource(Splits(training=entries, held_out=entries[:1]), seed, "do this")


def ids(source: ListedSource, rollout: int, count: int) -> list[str]:
    return [example.id for example in source.training(rollout, count)]


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_in_a_cycle_every_example_has_the_same_number_of_turns(sizes, count, cycle) -> None:
    source, total = source_of(*sizes), sum(sizes)
    rollouts = range(cycle * total, (cycle + 1) * total)
    turns = Counter(i for rollout in rollouts for i in ids(source, rollout, count))
    assert len(turns) == total
    assert set(turns.values()) == {count}


@settings(max_examples=30)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 5))
def test_a_batch_has_one_layout(sizes, count) -> None:
    source = source_of(*sizes)
    for rollout in range(2 * sum(sizes)):
        batch = source.training(rollout, count)
        assert len(batch) == count
        assert len({layout(r.shape[1:] for r in e.references) for e in batch}) == 1


@settings(max_examples=30)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 5))
def test_all_of_a_layout_come_before_one_comes_again(sizes, count) -> None:
    source = source_of(*sizes)
    seen: dict[str, list[str]] = {}
    for rollout in range(3 * sum(sizes)):
        for i in ids(source, rollout, count):
            seen.setdefault(i.split("-")[0], []).append(i)
    for group, stream in seen.items():
        size = sizes[int(group)]
        for start in range(0, len(stream), size):
            window = stream[start : start + size]
            assert len(set(window)) == len(window)


def test_with_one_layout_every_epoch_shows_every_example_once_in_a_new_order() -> None:
    source = source_of(6)
    orders = [[i for r in range(3 * k, 3 * k + 3) for i in ids(source, r, 2)] for k in range(3)]
    assert all(sorted(order) == sorted(f"0-{i}" for i in range(6)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_layouts_take_turns_evenly() -> None:
    """No window of rollouts misses a layout's share by more than one turn and a bit."""
    source = source_of(30, 15, 5)
    groups = [int(ids(source, rollout, 1)[0][0]) for rollout in range(50)]
    for size in (10, 20, 30):
        for start in range(50 - size):
            counts = Counter(groups[start : start + size])
            for group, share in enumerate((0.6, 0.3, 0.1)):
                assert abs(counts[group] - share * size) <= 2


def test_any_rollout_can_be_had_without_the_others() -> None:
    one, two = source_of(7, 3), source_of(7, 3)
    forwards = [ids(one, rollout, 3) for rollout in range(25)]
    backwards = [ids(two, rollout, 3) for rollout in reversed(range(25))][::-1]
    assert forwards == backwards
    assert forwards != [ids(source_of(7, 3, seed=1), rollout, 3) for rollout in range(25)]


def test_number_of_references_is_part_of_the_layout() -> None:
    square = Blank(64, 64)
    one = [Entry(id=f"1-{i}", prompt="x", references=(square,)) for i in range(4)]
    two = [Entry(id=f"2-{i}", prompt="x", references=(square, square)) for i in range(4)]
    source = ListedSource(Splits(training=one + two, held_out=one), 0, "")
    numbers = [{len(e.references) for e in source.training(r, 2)} for r in range(8)]
    assert all(len(n) == 1 for n in numbers)
    assert {n for batch in numbers for n in batch} == {1, 2}


def test_listing_reads_no_picture() -> None:
    source = source_of(3, 2)
    listed = source.listed()
    assert len(listed) == 6
    assert [e.references[0].shape for e in listed][3] == (3, 64, 96)
    assert listed[0].references[0].is_meta
    assert [e.id for e in listed[1:3]] == ["0-1", "0-2"]
    pictures = [e.references[0] for e in source.splits.training]
    assert sum(p.reads for p in pictures) == 0  # pyright: ignore
    source.training(0, 2)
    assert sum(p.reads for p in pictures) == 2  # pyright: ignore


def test_the_cache_forgets_what_was_used_longest_ago() -> None:
    size = 3 * 64 * 64 * 4
    a, b, c = (Blank(64, 64) for _ in range(3))
    cache = PictureCache(capacity=2 * size)
    for picture in (a, b, a, c, a, b):
        assert cache.load(picture).shape == (3, 64, 64)
    assert (a.reads, b.reads, c.reads) == (1, 2, 1)
    assert cache.load(b) is cache.load(b)
    small = PictureCache(capacity=1)
    assert small.load(a) is small.load(a)  # larger than the cache, and loaded all the same


def test_without_validation_examples_the_fix_is_named() -> None:
    with pytest.raises(ConfigError, match=r"validation: must have examples.*do this"):
        source_of(3).validation(1)


def test_two_examples_of_one_id_are_refused() -> None:
    entries = entries_of((2,))
    with pytest.raises(DataError, match="here: id: must be unique, got '0-1' twice"):
        check_entries([*entries, entries[1]], "here")
    with pytest.raises(DataError, match="here: must hold at least one example"):
        check_entries([], "here")


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=40),
    st.floats(0.01, 0.6),
    st.randoms(),
)
def test_split_by_subject(subjects: list[str], share: float, random) -> None:
    entries = [Entry(id=f"{s}{i}", prompt="x", references=()) for i, s in enumerate(subjects)]
    splits = split_by_subject(entries, subjects, share)
    parts = [{e.id[0] for e in p} for p in (splits.training, splits.held_out, splits.validation)]
    assert sum(map(len, parts)) == len(set(subjects))
    assert set.union(*parts) == set(subjects)
    assert len(parts[1]) == min(len(set(subjects)), max(1, round(share * len(set(subjects)))))
    shuffled = list(zip(entries, subjects, strict=True))
    random.shuffle(shuffled)
    again = split_by_subject([e for e, _ in shuffled], [s for _, s in shuffled], share)
    assert [e.id for e in again.held_out] == [e.id for e in splits.held_out]
    assert [e.id for e in again.validation] == [e.id for e in splits.validation]
