"""What is wrong with a picture, in one word: marks of grids, from the shares of right pictures."""

from __future__ import annotations

from customized_grpo.evaluation.outcome import Judgement
from customized_grpo.pictures import Mark, Marks

# Okabe and Ito's palette, as the figures; the words say the same without colours.
COPY = Mark("copy", "a copy of the reference", "#000000", "#E69F00")
OTHER = Mark("other", "another subject", "#FFFFFF", "#0072B2")
MISSED = Mark("missed", "not all that the prompt asks for", "#FFFFFF", "#333333")


def marks(judged: Judgement, count: int) -> Marks:
    """Of the first ``count`` pictures; none where their data do not know what is right.

    A copy shows the reference's subject, if not in the look that was asked for: no other one.
    """
    columns = [judged.columns.get(name) for name in ("copies", "subject_right", "prompt_right")]
    found: list[list[Mark]] = []
    for row in range(count):
        copies, subject, prompt = (None if column is None else column[row] for column in columns)
        some = [COPY] if copies == 1 else [OTHER] if subject == 0 else []
        found.append([*some, *([MISSED] if prompt == 0 else [])])
    return found
