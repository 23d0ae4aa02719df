"""Going on with a run: which of its checkpoints, and may the config have changed?"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from customized_grpo.config import RunConfig
from customized_grpo.config.decoding import show, to_raw
from customized_grpo.errors import ConfigError
from customized_grpo.files import remove
from customized_grpo.runs.checkpoint import WEIGHTS
from customized_grpo.runs.files import CHECKPOINTS, FAILURES, SAMPLES, START, checkpoint_folders

logger = logging.getLogger("customized_grpo")

_PLACE = ("name", "output_dir")
# Fields that decide how long and how fast a run goes, not what it computes.
_FREE = (
    "device", "deterministic", "compile", "fsdp", "cache",
    "generator.attention", "rollout.batch_size", "train.num_updates", "train.micro_batch_size",
    "train.sample_every", "train.sample_minutes", "train.save_every", "train.save_minutes",
    "train.keep_checkpoints", "faults", "sinks",
)  # fmt: skip
# Fields without which a checkpoint means nothing.
_FIXED = (
    "generator", "lora", "algorithm.type", "train.optimizer", "rollout.prompts_per_rollout",
)  # fmt: skip
_WHY = {
    "algorithm.type": "the policy that samples has to begin with the run",
    "rollout.prompts_per_rollout": "the data's order counts rollouts of that many prompts, so "
    "examples would be repeated or left out",
    "train.ema_decay": "an average has to begin with the run",
}

# Names that an interrupted write leaves, by the folder. Nothing else: users keep things in a run.
_PART = r".+\.\d+\.tmp"
_LEFT = {
    "*": rf"({WEIGHTS}|{START})\.(tmp|old)|{WEIGHTS}|{_PART}",
    f"{CHECKPOINTS}/*": rf"\d+(\.(tmp|old|{WEIGHTS}))?",
    f"{FAILURES}/*": r"\d+\S*\.(tmp|old)",
    f"{SAMPLES}/*": rf"\d+\.png|{_PART}",
    "sinks/*": _PART,
    "pictures/*/*": _PART,
    "votes/*": _PART,
    "votes/pictures/*": _PART,
}


def check_changes(old: RunConfig, new: RunConfig, *, allow_changed: bool) -> None:
    """Logs what differs.

    Raises:
        ConfigError: if it would make the run wrong, or another run and that is not allowed.
    """
    for field, before, after in changes(to_raw(old), to_raw(new)):
        change = f"{field}: {show(before)} -> {show(after)}"
        averaging = field == "train.ema_decay" and None in (before, after)
        is_free = _is_in(field, (*_PLACE, *_FREE))
        if averaging or (_is_in(field, _FIXED) and not is_free):
            why = _WHY.get(field, "what was trained does not fit it")
            raise ConfigError(
                f"{field} must stay {show(before)} when a run is resumed, got {show(after)}: "
                f"{why}; start another run. Free to change are {', '.join(_FREE)}"
            )
        if not (allow_changed or is_free):
            raise ConfigError(
                f"{field} must stay {show(before)} when a run is resumed, got {show(after)}; it "
                "would be another run from here on: add --allow-changed if that is meant"
            )
        if field != "output_dir" or Path(before).resolve() != Path(after).resolve():
            logger.info("resumed with another %s", change)
    if old.has_old_policy != new.has_old_policy:
        need, has = ("needs", "none") if new.has_old_policy else ("has no use for", "one")
        decay, inner = getattr(new.algorithm, "old_decay", None), new.train.inner_updates
        raise ConfigError(
            f"algorithm.old_decay {show(decay)} with train.inner_updates {inner} {need} an older "
            f"policy that samples, and the run has {has}; it has to begin with the run: start "
            "another run"
        )


def changes(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Field, old and new value of everything that differs between two raw configs."""
    if old == new:
        return
    if not (isinstance(old, dict) and isinstance(new, dict)):
        yield path, old, new
        return
    for name in dict.fromkeys([*old, *new]):
        yield from changes(old.get(name), new.get(name), f"{path}.{name}" if path else name)


def _is_in(field: str, names: Sequence[str]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)


def remove_leftovers(run: Path, update: int) -> None:
    """Deletes what must not stay in the folder of a run that goes on after ``update``: parts of
    interrupted writes, later checkpoints (which are damaged) and sample pictures (which come
    again), and weights of an end that was none."""
    kept = [*checkpoint_folders(run), *(run / SAMPLES).glob("*.png")]
    kept = {path for path in kept if path.stem.isdecimal() and int(path.stem) <= update}
    for folder, left in _LEFT.items():
        for path in run.glob(folder):
            if re.fullmatch(left, path.name, re.ASCII) and path not in kept:
                remove(path)
