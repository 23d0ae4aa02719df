"""What training has changed: against plain numpy, with noise, slight changes and unscored ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from customized_grpo.config import RunConfig
from customized_grpo.training.gains import Gains

IDENTITY, PROMPT = "validation/dinov2", "validation/clip-text"
RANDOM = np.random.default_rng(0)
BASE = RANDOM.normal(size=32)


def look(gains: Gains, change: np.ndarray, *, is_base: bool = False) -> dict[str, float]:
    """The identity changes; the prompt is not scored."""
    scores = {IDENTITY: torch.tensor(BASE + change), PROMPT: torch.full((32,), math.nan)}
    return gains.look(scores, is_base=is_base)


@pytest.fixture
def gains(tiny_config: RunConfig) -> Gains:
    gains = Gains(tiny_config)
    assert look(gains, np.zeros(32), is_base=True) == {}
    return gains


@pytest.mark.parametrize(
    ("shift", "spread", "sign"),
    [(0.5, 0.3, 1), (-0.5, 0.3, -1), (0.02, 0.3, 0), (0.05, 0.001, 0)],
    ids=["rises", "falls", "noise", "slight"],
)
def test_a_gain_is_paired_and_counts_beyond_noise(
    gains: Gains, shift: float, spread: float, sign: int
) -> None:
    change = shift + spread * np.resize([-1.0, 1.0], 32)
    found = look(gains, change)
    assert found.keys() == {"gain/identity", "gain/identity/error", "gain/identity/sign"}
    assert found["gain/identity"] == pytest.approx(change.mean())
    error = change.std(ddof=1) / 32**0.5
    assert found["gain/identity/error"] == pytest.approx(error, abs=1e-9)
    assert found["gain/identity/sign"] == sign


def test_without_the_base_or_with_other_examples_nothing_is_said(
    gains: Gains, tiny_config: RunConfig
) -> None:
    assert look(Gains(tiny_config), np.ones(32)) == {}  # resumed from an earlier version
    gains.base = {name: column[:5] for name, column in gains.base.items()}
    assert look(gains, np.ones(32)) == {}


def test_where_it_is_known_what_is_right_counts_and_not_similarity(gains: Gains) -> None:
    """A run that unlearns to copy has less similarity to the reference, and more right subjects."""
    right = torch.tensor([0.0, 1.0] * 16)
    shares = {"validation/share/subject_right": right}
    scores = {IDENTITY: torch.tensor(BASE), PROMPT: torch.full((32,), math.nan)}
    gains.look(scores | shares, is_base=True)
    less = scores | {IDENTITY: torch.tensor(BASE - 1)}
    shares["validation/share/subject_right"] = torch.ones(32)
    found = gains.look(less | shares, is_base=False)
    assert (found["gain/identity"], found["gain/identity/sign"]) == (0.5, 1)
