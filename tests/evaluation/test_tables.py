"""What people read of an evaluation: shares, and a sentence that says no more than they do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_up import made_up

from customized_grpo.evaluation.outcome import Judgement, Outcome
from customized_grpo.evaluation.tables import share_table, verdict
from customized_grpo.rewards.truth import SHARES


def _outcome(base: dict[str, int], tuned: dict[str, int], count: int = 100) -> Outcome:
    """Of the first ``n`` of ``count`` pictures each share holds."""

    def judged(numbers: dict[str, int]) -> Judgement:
        return Judgement(columns={k: [1.0] * n + [0.0] * (count - n) for k, n in numbers.items()})

    yardstick = replace(
        made_up().yardstick, items=made_up().yardstick.items[:1] * count, base=judged(base)
    )
    return Outcome(name="tuned", own=judged(tuned), yardstick=yardstick)


BASE = dict(zip(SHARES, (40, 50, 20, 20), strict=True))


@pytest.mark.parametrize(
    ("tuned", "sentence"),
    [
        (
            (80, 60, 50, 2),
            "30 more of 100 pictures show the right subject as the prompt asks (prompt right +40, "
            "subject right +10, copies -18).",
        ),
        (
            (40, 30, 10, 60),
            "10 fewer of 100 pictures show the right subject as the prompt asks (subject right "
            "-20, copies +40).",
        ),
        (
            (41, 51, 21, 20),
            "No clear change in how many pictures show the right subject as the prompt asks (nor "
            "in its parts).",
        ),
    ],
)
def test_the_verdict_says_what_is_clear(tuned: tuple[int, ...], sentence: str) -> None:
    outcome = _outcome(BASE, dict(zip(SHARES, tuned, strict=True)))
    assert verdict(outcome) == sentence


def test_shares_of_base_and_tuned_stand_side_by_side() -> None:
    table = share_table(_outcome(BASE, BASE | {"copies": 0}))
    rows = {line[:13].strip(): line.split()[-9:] for line in table.splitlines()[1:5]}
    assert rows["copies"][:3] == ["0.200", "±", "0.040"]
    assert rows["copies"][-3:] == ["-0.200", "±", "0.040"]
    assert list(rows) == ["prompt right", "subject right", "both right", "copies"]
    assert "standard error" in table


def test_without_truth_there_is_no_verdict() -> None:
    assert verdict(_outcome({"clip-text": 1}, {"clip-text": 2})) == ""
