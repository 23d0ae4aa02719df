"""Every formula against a plain loop or an oracle, and properties that hold for any input."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from customized_grpo.config.names import COPY, ORACLE, RANDOM
from customized_grpo.evaluation.anchors import identity_anchors
from customized_grpo.evaluation.items import (
    BenchmarkSet,
    Item,
    Photo,
    PhotographedSubject,
    Rendered,
)
from customized_grpo.evaluation.measures import (
    diversity_column,
    frechet_distance,
    high_frequency_energy,
    hypervolume,
    identity_columns,
    joint_columns,
    other_prompts,
)

NAN = math.nan


def unit(count: int, seed: int = 0) -> Tensor:
    features = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(features.double(), dim=1)


def cosine(a: Tensor, b: Tensor) -> float:
    dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    norms = [math.sqrt(sum(x * x for x in v.tolist())) for v in (a, b)]
    return dot / (norms[0] * norms[1])


def test_identity_equals_a_loop() -> None:
    outputs, photos = unit(3, 1), unit(6)
    references, of = [[0], [1, 2], [5]], [[0, 1, 2], [0, 1, 2], [5]]
    for pool in ("max", "mean"):
        found = identity_columns(outputs @ photos.T, references, of, pool)
        for n, output in enumerate(outputs):
            shown = [cosine(output, photos[r]) for r in references[n]]
            all_ = [cosine(output, photos[r]) for r in of[n]]
            other = [cosine(output, photos[r]) for r in of[n] if r not in references[n]]
            reference = max(shown) if pool == "max" else sum(shown) / len(shown)
            assert found["reference"][n].item() == pytest.approx(reference, abs=1e-9)
            assert found["photos"][n].item() == pytest.approx(sum(all_) / len(all_), abs=1e-9)
            copy = reference - sum(other) / len(other) if other else NAN
            assert found["copy"][n].item() == pytest.approx(copy, abs=1e-9, nan_ok=True)


def test_a_photo_without_its_subject_is_left_out() -> None:
    similarity = torch.tensor([[NAN, 0.5, 0.3], [NAN, NAN, 0.3]], dtype=torch.float64)
    found = identity_columns(similarity, [[0, 1], [0]], [[0, 1, 2], [0, 1, 2]])
    assert found["reference"].tolist() == pytest.approx([0.5, NAN], nan_ok=True)
    assert found["photos"].tolist() == pytest.approx([0.4, 0.3])
    assert found["copy"].tolist() == pytest.approx([0.2, NAN], nan_ok=True)


def test_diversity_is_the_mean_over_pairs() -> None:
    features = unit(6)
    column = diversity_column(features, ["a", "a", "b", "a", "c", "b"])
    pairs = [(0, 1), (0, 3), (1, 3)]
    mean = sum(1 - cosine(features[i], features[j]) for i, j in pairs) / 3
    assert column[[0, 1, 3]].mean().item() == pytest.approx(mean, abs=1e-9)
    assert column[2] == column[5] == pytest.approx(1 - cosine(features[2], features[5]), abs=1e-9)
    assert math.isnan(column[4])


def test_features_of_a_gpu_make_a_column_beside_the_others() -> None:
    """Torch's fake tensors know of devices that are not there, and refuse to mix them."""
    with FakeTensorMode():
        column = diversity_column(torch.empty(4, 8, device="cuda"), ["a", "a", "b", "b"])
    assert column.device.type == "cpu"


def test_joint_rates_need_every_objective_and_leave_out_what_is_not_known() -> None:
    own = {"p": torch.tensor([2.0, 2, 0, NAN, 1]), "i": torch.tensor([2.0, 0, 0, 2, 1])}
    base = {"p": torch.ones(5), "i": torch.ones(5)}
    found = joint_columns(own, base)
    assert found["joint/domination"].tolist() == pytest.approx([1, 0, 0, NAN, 0], nan_ok=True)
    assert found["joint/collapse"].tolist() == pytest.approx([0, 0, 1, NAN, 0], nan_ok=True)


def test_the_other_prompt_is_of_the_same_subject_where_there_is_one() -> None:
    asked = [("a", "x"), ("a", "y"), ("a", "x"), ("b", "x"), ("c", "z")]
    assert other_prompts(asked) == ["y", "x", "y", "y", "x"]
    assert other_prompts([("a", "x"), ("b", "x")]) == ["x", "x"]


def bench(sizes: dict[str, int]) -> BenchmarkSet:
    picture = Rendered(torch.zeros(3, 2, 2))
    subjects = {}
    for name, count in sizes.items():
        names = [str(i) for i in range(count)]
        photos = tuple(Photo(name=n, picture=picture, digest=f"{name}{n}") for n in names)
        subjects[name] = PhotographedSubject(name=name, words=name, photos=photos)
    items = [Item(subject=name, prompt_index=0, prompt="x", references=("0",)) for name in sizes]
    return BenchmarkSet(type="test", subjects=subjects, items=tuple(items))


def test_anchors_equal_loops() -> None:
    wanted = bench({"a": 4, "b": 2, "c": 1})
    photos = unit(7)
    found = identity_anchors(photos, wanted, wanted.items)

    def sim(p: int, q: int) -> float:
        return cosine(photos[p], photos[q])

    def mean(numbers: list[float]) -> float:
        return sum(numbers) / len(numbers) if numbers else NAN

    for n, (first, count) in enumerate([(0, 4), (4, 2), (6, 1)]):
        own = list(range(first, first + count))
        rest, other = own[1:], [p for p in range(7) if p not in own]
        excess = [
            sim(p, first) - mean([sim(p, q) for q in own if q not in (p, first)]) for p in rest
        ]
        expected = {
            ORACLE: {
                "reference": mean([sim(p, first) for p in rest]),
                "photos": mean([mean([sim(p, q) for q in own if q != p]) for p in rest]),
                "copy": mean([value for value in excess if not math.isnan(value)]),
            },
            COPY: {
                "reference": 1.0,
                "photos": mean([sim(first, q) for q in own]),
                "copy": 1 - mean([sim(first, q) for q in rest]),
            },
            RANDOM: {
                "reference": mean([sim(p, first) for p in other]),
                "photos": mean([sim(p, q) for p in other for q in own]),
                "copy": mean([sim(p, first) - mean([sim(p, q) for q in rest]) for p in other]),
            },
        }
        for anchor, columns in expected.items():
            for name, value in columns.items():
                number = found[anchor][name][n].item()
                assert number == pytest.approx(value, abs=1e-9, nan_ok=True), (anchor, name, n)


def test_of_several_references_a_random_subject_too_takes_the_most_similar() -> None:
    wanted = bench({"a": 3, "b": 2})
    item = replace(wanted.items[0], references=("0", "1"))
    photos = unit(5)
    similarity = photos.double() @ photos.double().T
    found = identity_anchors(photos, wanted, [item])[RANDOM]["reference"].item()
    assert found == pytest.approx(similarity[3:, :2].max(1).values.mean().item(), abs=1e-9)
    found = identity_anchors(photos, wanted, [item], "mean")[RANDOM]["reference"].item()
    assert found == pytest.approx(similarity[3:, :2].mean().item(), abs=1e-9)


def test_hypervolume_of_a_point() -> None:
    assert hypervolume((0.5, 0.75), (0.25, 0.25)) == 0.125
    assert hypervolume((-1, 5), (0, 0)) == hypervolume((-1, -1), (0, 0)) == 0


def test_frechet_distance_equals_scipys_matrix_root() -> None:
    from scipy.linalg import sqrtm

    a = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    b = torch.randn(150, 6, dtype=torch.float64) + 1
    c1, c2 = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = np.trace(sqrtm(c1 @ c2).real)
    means = ((a.mean(0) - b.mean(0)) ** 2).sum().item()
    wanted = means + np.trace(c1) + np.trace(c2) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_high_frequencies_are_those_above_half_the_nyquist_frequency() -> None:
    x = torch.arange(64.0)
    slow, fast = (0.5 + 0.5 * torch.sin(2 * math.pi * k * x / 64) for k in (15, 17))
    images = torch.stack([wave.expand(3, 64, 64) for wave in (slow, fast)])
    low, high = high_frequency_energy(images).tolist()
    assert low < 1e-6
    assert high > 0.01
    grid = images[0].clone()
    grid[:, ::2, ::2] += 0.1
    assert high_frequency_energy(grid[None]) > 1e-4
