"""What training has changed so far, by the validation examples."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from customized_grpo.config import RunConfig
from customized_grpo.ops.significance import change, is_clear, is_slight

_RIGHT = {
    "prompt": "validation/share/prompt_right",
    "identity": "validation/share/subject_right",
}


class Gains:
    """Remembers the scores before the first update; of each objective whether it is right, where
    that is known, else its first evaluator: fewer copies have less similarity to the reference.
    """

    def __init__(self, config: RunConfig) -> None:
        leading = {e.objective: f"validation/{e.label}" for e in reversed(config.evaluators)}
        self._columns = {objective: leading[objective] for objective in sorted(leading)}
        self.base: dict[str, list[float]] = {}
        """Objective -> score of every example; NaN: not scored. Empty: not known."""

    def look(self, scores: Mapping[str, Tensor], *, is_base: bool) -> dict[str, float]:
        """Takes in a validation, ``validation/EVALUATOR`` or ``validation/share/NAME`` -> ``[B]``.

        Returns ``gain/OBJECTIVE``, the mean paired difference to the base, its standard error
        ``gain/OBJECTIVE/error``, and ``gain/OBJECTIVE/sign``: 1 and -1 if it is more than noise and
        large enough to speak of, else 0. Nothing of the base itself, or where it is not known.
        """
        now = {
            objective: scores.get(_RIGHT.get(objective, ""), scores[name]).double()
            for objective, name in self._columns.items()
        }
        if is_base:
            self.base = {objective: column.tolist() for objective, column in now.items()}
            return {}
        found: dict[str, float] = {}
        for objective, column in now.items():
            base = torch.tensor(self.base.get(objective, []), dtype=torch.float64)
            if len(base) == len(column):  # else resumed with other examples
                found |= _gain(f"gain/{objective}", column.cpu(), base)
        return found


def _gain(name: str, now: Tensor, base: Tensor) -> dict[str, float]:
    mean, error = change(now, base)
    if math.isnan(mean):
        return {}
    sign = 0.0
    if is_clear(mean, error) and not is_slight(mean, base):
        sign = 1.0 if mean > 0 else -1.0
    return {name: mean, f"{name}/error": error, f"{name}/sign": sign}
