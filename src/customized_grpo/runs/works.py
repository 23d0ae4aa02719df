"""Does it work? A sentence from a row of the log, for people; nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_WORDS = {1: "better", 0: "no different to speak of", -1: "worse"}


def does_it_work(row: Mapping[str, float]) -> str:
    """Whether every objective has risen beyond its error since before the first update, and if not
    what to change; "" of a row that does not say, as it has no validation."""
    signs = {
        name.split("/")[1]: int(value)
        for name, value in row.items()
        if name.startswith("gain/") and name.endswith("/sign")
    }
    if not signs:
        return ""
    parts = [
        f"{name} is {_WORDS[sign]} ({row[f'gain/{name}']:+z.4f} ± {row[f'gain/{name}/error']:.4f})"
        for name, sign in signs.items()
    ]
    answer, advice = _judge(signs)
    return f"{answer}: by the validation of update {row['update']}, {', '.join(parts)}{advice}."


def _judge(signs: Mapping[str, int]) -> tuple[str, str]:
    """The answer, and what to change."""
    better, same, worse = (_named(signs, sign) for sign in (1, 0, -1))
    if not same and not worse:
        return "it works", ""
    if not better and not worse:
        more = "`cgrpo resume` with a larger --train.num_updates"
        return "no effect yet", f"; make more updates ({more}), or double train.learning_rate"
    if not better:
        return "it does harm", "; halve train.learning_rate"
    more = f"; give {' and '.join(worse or same)} more weight (advantage.schedule)"
    return ("one at the other's cost", more) if worse else ("half of it works", more)


def _named(signs: Mapping[str, int], sign: int) -> Sequence[str]:
    return [name for name, value in signs.items() if value == sign]
