"""What people read of an evaluation: shares, and a sentence that says no more than they do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_up import made_up

from customized_grpo.evaluation.outcome import Judgement, Outcome
from customized_grpo.evaluation.tables import Table, run_table, share_table, verdict
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
            "No difference to speak of in how many pictures show the right subject as the prompt "
            "asks (nor in its parts).",
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


def _by_evaluators(identity: float, prompt: float, noise: float) -> Outcome:
    """Means move by so much; the pictures' differences scatter by ``noise``."""
    columns = {"dinov2": identity, "clip-text": prompt}
    rows = torch.arange(100)
    base = dict.fromkeys(columns, rows % 10 / 10)  # a spread of .29
    moved = {n: base[n] + gain + noise * (-1.0) ** rows for n, gain in columns.items()}
    yardstick = made_up().yardstick
    items = tuple(replace(yardstick.items[0], subject=f"s{row // 2}") for row in range(100))
    return Outcome(
        name="tuned",
        own=Judgement.of(moved),
        yardstick=replace(yardstick, items=items, base=Judgement.of(base)),
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        # 0.0004 is certain, and less than what tells any two pictures apart.
        (
            (0.0004, 0.0, 0.001),
            "No difference to speak of between tuned and base: identity +0.0004 ± 0.0001, prompt "
            "+0.0000 ± 0.0001.",
        ),
        # 0.05 is large, and 1.6 standard errors.
        (
            (0.05, -0.01, 0.31),
            "No difference to speak of between tuned and base: identity +0.0500 ± 0.0312, prompt "
            "-0.0100 ± 0.0312.",
        ),
        (
            (0.05, -0.001, 0.1),
            "tuned is better in identity (+0.0500 ± 0.0101), no different to speak of in prompt "
            "(-0.0010 ± 0.0101).",
        ),
        (
            (-0.06, 0.05, 0.1),
            "tuned is worse in identity (-0.0600 ± 0.0101), better in prompt (+0.0500 ± 0.0101).",
        ),
    ],
)
def test_without_truth_the_evaluators_tell_whether_there_is_a_difference(
    change: tuple[float, float, float], sentence: str
) -> None:
    assert verdict(_by_evaluators(*change)) == sentence


def test_pictures_of_one_subject_do_not_make_a_change_of_it_certain() -> None:
    """All of a subject's pictures move alike: 50 of three subjects are three numbers."""
    outcome = _by_evaluators(0.05, 0.0, 0.1)
    base = outcome.yardstick.base
    assert base is not None
    moves = torch.tensor([0.3, -0.1, 0.05])[torch.arange(100) % 3]
    own = Judgement.of({name: base.tensors[name] + moves for name in base.columns})
    items = [replace(item, subject=f"s{i % 3}") for i, item in enumerate(outcome.yardstick.items)]
    yardstick = replace(outcome.yardstick, items=tuple(items))
    mean, error = replace(outcome, own=own).change("dinov2")
    assert mean > 2 * error
    assert "better" not in verdict(replace(outcome, own=own, yardstick=yardstick))


def test_shares_that_all_change_are_clear_and_less_than_a_picture_is_none() -> None:
    none, all_ = dict.fromkeys(SHARES, 0), dict.fromkeys(SHARES, 100)
    assert verdict(_outcome(none, all_)).startswith("100 more of 100 pictures")
    alone = verdict(_outcome({"both_right": 0}, {"both_right": 50}))
    assert alone == "50 more of 100 pictures show the right subject as the prompt asks."
    many = _outcome({"both_right": 0}, {"both_right": 8}, count=1000)
    assert verdict(many).startswith("No difference to speak of in how many")


def test_a_label_moves_no_column() -> None:
    table = Table(heads=["", "A | B"], rows=[["A | B", "1"]])
    assert table.markdown().splitlines() == [r"|  | A \| B |", "| --- | ---: |", r"| A \| B | 1 |"]


def test_what_rounds_to_nothing_has_no_sign() -> None:
    yardstick = made_up().yardstick
    assert yardstick.base is not None
    own, base = (
        replace(yardstick.base, columns=yardstick.base.columns | {"copy": [number] * 10})
        for number in (-0.00002, -0.00001)
    )
    outcome = Outcome(name="tuned", own=own, yardstick=replace(yardstick, base=base))
    (row,) = (line for line in run_table(outcome).splitlines() if line.startswith("copy "))
    assert row.split()[-5:] == ["0.0000", "0.0000", "+0.0000", "±", "0.0000"]


def test_without_a_base_there_is_no_verdict() -> None:
    outcome = _by_evaluators(0.05, 0.0, 0.1)
    assert verdict(replace(outcome, yardstick=replace(outcome.yardstick, base=None))) == ""
