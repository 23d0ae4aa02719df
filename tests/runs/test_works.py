"""The sentence that says whether a run works, of every kind of answer."""

from __future__ import annotations

import pytest

from customized_grpo.runs.works import does_it_work


def row(**signs: int) -> dict[str, float]:
    values: dict[str, float] = {"update": 40, "loss": 0.1, "validation/x": 0.5}
    for number, (name, sign) in enumerate(signs.items(), 1):
        gain = sign * number / 100
        values |= {f"gain/{name}": gain, f"gain/{name}/error": 0.004, f"gain/{name}/sign": sign}
    return values


@pytest.mark.parametrize(
    ("signs", "begins", "ends"),
    [
        (
            (1, 1),
            "it works: by the validation of update 40",
            "prompt is better (+0.0200 ± 0.0040).",
        ),
        (
            (0, 0),
            "no effect yet",
            "; make more updates (`cgrpo resume` with a larger --train.num_updates), or double "
            "train.learning_rate.",
        ),
        ((1, 0), "half of it works", "; give prompt more weight (advantage.schedule)."),
        ((-1, 1), "one at the other's cost", "; give identity more weight (advantage.schedule)."),
        ((0, -1), "it does harm", "; halve train.learning_rate."),
        ((-1, -1), "it does harm", "; halve train.learning_rate."),
    ],
)
def test_the_answer_and_what_to_change(signs: tuple[int, int], begins: str, ends: str) -> None:
    text = does_it_work(row(identity=signs[0], prompt=signs[1]))
    assert text.startswith(begins)
    assert text.endswith(ends)
    assert text.count("identity is ") == text.count("prompt is ") == 1


def test_three_objectives_and_one() -> None:
    text = does_it_work(row(identity=1, prompt=-1, style=-1))
    assert text.endswith("; give prompt and style more weight (advantage.schedule).")
    assert does_it_work(row(identity=1)).startswith("it works")


def test_a_row_without_gains_says_nothing() -> None:
    assert does_it_work(row()) == ""
