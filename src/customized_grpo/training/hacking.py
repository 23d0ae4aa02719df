"""Alarms: an evaluator falls while a reward of the same objective, or the copy gap, rises.

The first is how it looks when a reward is over-optimised: both rise, then the evaluator turns, and
the reward does not (Gao et al., arXiv:2210.10760). The second is the competitive degradation of
arXiv:2510.18263, seen by evaluators of anything but the identity: pictures come nearer to the
reference, background and all, and do less of what the prompt asks for. Both numbers are held
against the validation at which the evaluator was best, picture by picture, and both changes have to
be more than noise, several times in a row.
"""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customized_grpo.config import RunConfig
from customized_grpo.files import replace_folder
from customized_grpo.ops.significance import change, is_clear
from customized_grpo.runs.alarms import ALARMS
from customized_grpo.runs.checkpoint import WEIGHTS, best_checkpoint
from customized_grpo.runs.log import RunLog

logger = logging.getLogger("customized_grpo")

COPY_GAPS = {"validation": "copy_gap/validation", "validation/reward": "copy_gap/reward"}
"""Their columns, by those whose encoder measures: of evaluators and of rewards."""


@dataclass(kw_only=True, slots=True)
class Peak:
    """The validation at which an evaluator was best, and what came after."""

    scores: dict[str, list[float]]
    """Of every example then, by the evaluator and what may rise; NaN: not scored."""
    in_a_row: int = 0
    """Validations up to now that look bad."""
    fall: float = 0.0
    """The evaluator's last change since."""
    rise: float = 0.0
    """That of what has risen."""


class HackingAlarm:
    """Remembers the best validation of evaluators: for ``hacking`` of those whose objective is
    rewarded, for ``copying`` of those that are not of the identity."""

    def __init__(self, config: RunConfig) -> None:
        rewards = {reward.label: reward.objective for reward in config.pointwise_rewards}
        self._rises: dict[str, list[str]] = {}
        for evaluator in config.evaluators:
            own = [n for n, objective in rewards.items() if objective == evaluator.objective]
            if own:
                self._rises[f"hacking/{evaluator.label}"] = [f"validation/reward/{n}" for n in own]
            if evaluator.objective != "identity":
                self._rises[f"copying/{evaluator.label}"] = [*COPY_GAPS.values()]
        self._patience = config.faults.hacking_patience
        self._peaks: dict[str, Peak] = {}

    def look(self, scores: Mapping[str, Tensor]) -> dict[str, float]:
        """Takes in a validation: ``validation/EVALUATOR``, ``validation/reward/NAME`` and the copy
        gaps -> ``[B]``; NaN: not scored.

        Returns ``hacking/EVALUATOR`` and ``copying/EVALUATOR``, the validations in a row that look
        so; nothing where one side was never known, as the copy gap without masks.
        """
        for count, rises in self._rises.items():
            evaluator, *others = [f"validation/{_evaluator(count)}", *rises]
            is_known = {name: not scores[name].isnan().all() for name in (evaluator, *others)}
            begun = count in self._peaks or any(is_known[name] for name in others)
            if is_known[evaluator] and begun:
                self._compare(count, {name: scores[name] for name in is_known})
        return {count: float(peak.in_a_row) for count, peak in self._peaks.items()}

    def _compare(self, count: str, now: Mapping[str, Tensor]) -> None:
        columns = {name: column.double().tolist() for name, column in now.items()}
        peak = self._peaks.setdefault(count, Peak(scores=columns))
        if _sizes(peak.scores) != _sizes(columns):  # resumed with other examples or rewards
            peak = self._peaks[count] = Peak(scores=columns)
        then = {n: torch.tensor(scores, dtype=torch.float64) for n, scores in peak.scores.items()}
        changes = [change(column.double().cpu(), then[name]) for name, column in now.items()]
        if changes[0][0] >= 0:
            self._peaks[count] = Peak(scores=columns)
            return
        (peak.fall, error), risen = changes[0], [m for m, e in changes[1:] if is_clear(m, e)]
        peak.rise = max(risen, default=0.0)
        looks_bad = is_clear(peak.fall, error) and peak.rise > 0
        peak.in_a_row = peak.in_a_row + 1 if looks_bad else 0

    def raised(self) -> str:
        """A sentence where the last validations raise the alarm; "" where they do not."""
        found: list[str] = []
        for count, peak in self._peaks.items():
            if peak.in_a_row >= self._patience:
                alarm = ALARMS[count.partition("/")[0]]
                found.append(
                    f"this looks like {alarm.name}: evaluator {_evaluator(count)!r} has fallen by "
                    f"{-peak.fall:.4f} since its best while {alarm.rise} has risen by "
                    f"{peak.rise:.4f}, {peak.in_a_row} validations in a row"
                )
        return "; ".join(found)

    @property
    def state(self) -> dict[str, Any]:
        """All that it remembers, for JSON."""
        return {name: asdict(peak) for name, peak in self._peaks.items()}

    @state.setter
    def state(self, peaks: Mapping[str, Any]) -> None:
        # The alarm for hacking was alone once, and went by the evaluator's name.
        named = {n if n in self._rises else f"hacking/{n}": peak for n, peak in peaks.items()}
        self._peaks = {n: Peak(**peak) for n, peak in named.items() if n in self._rises}


def end_with_best(log: RunLog, update: int, why: str) -> None:
    """Ends a run whose newest checkpoint is of ``update`` with the weights of its best."""
    folder, best = log.folder, best_checkpoint(log.folder)
    assert best is not None
    kept = best.folder / WEIGHTS

    def copy(new: Path) -> None:
        shutil.copytree(kept, new, dirs_exist_ok=True)

    replace_folder(folder / WEIGHTS, copy)
    score = best.record["score"]
    gain = "" if score is None else f" (the weakest evaluator: {score:+.1%} of the base)"
    text = (
        f"{why}; ended at update {update} with the weights of update {best.update}{gain}; `cgrpo "
        f"resume {shlex.quote(str(folder))} --faults.hacking warn` goes on all the same"
    )
    logger.warning("%s", text)
    log.stop(text)
    log.finish(best.update)


def _evaluator(count: str) -> str:
    return count.partition("/")[2]


def _sizes(scores: Mapping[str, Sequence[float]]) -> dict[str, int]:
    return {name: len(column) for name, column in scores.items()}
