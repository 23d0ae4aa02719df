"""What a picture is marked with."""

from __future__ import annotations

from customized_grpo.evaluation.marks import COPY, MISSED, OTHER, marks
from customized_grpo.evaluation.outcome import Judgement


def test_marks_say_what_is_wrong() -> None:
    columns: dict[str, list[float | None]] = {
        "prompt_right": [1, 0, 1, 0, 0, 0],
        "subject_right": [1, 1, 0, 0, 0, 1],
        "copies": [0, 0, 0, 0, 1, 1],
    }
    found = marks(Judgement(columns=columns), 6)
    assert found == [[], [MISSED], [OTHER], [OTHER, MISSED], [COPY, MISSED], [COPY, MISSED]]
    assert marks(Judgement(columns=columns), 2) == [[], [MISSED]]


def test_what_is_not_known_is_no_mistake() -> None:
    assert marks(Judgement(columns={"dinov2": [0.0, 1.0]}), 2) == [[], []]
    assert marks(Judgement(columns={"prompt_right": [None, 0.0]}), 2) == [[], [MISSED]]
