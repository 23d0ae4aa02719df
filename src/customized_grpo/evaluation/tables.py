"""The Markdown of an evaluation: anchors, baseline and model side by side, intervals, groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from customized_grpo.evaluation.outcome import Outcome
from customized_grpo.evaluation.statistics import RESAMPLES, Estimate

# arXiv:2510.18263, DreamBench, 750 prompts; (DINO, HPSv3).
PUBLISHED = {
    "UNO (base)": (0.760, 7.87),
    "naive GRPO 1:1": (0.861, 4.12),
    "naive GRPO 1:1.5": (0.801, 7.56),
    "Customized-GRPO": (0.812, 8.32),
    "OminiControl": (0.684, 8.28),
    "OmniGen": (0.693, 6.67),
    "FLUX IP-Adapter": (0.582, 7.68),
    "SSR-Encoder": (0.612, 4.82),
    "ELITE": (0.647, 3.12),
}


def markdown(outcome: Outcome) -> str:
    """The whole document."""
    parts = [f"# {outcome.name} on {outcome.type}", _what(outcome)]
    if outcome.missing:
        parts.append(partial_note(outcome))
    parts += ["## All pictures", _main(outcome), _notes(outcome)]
    for name, groups in outcome.groups.items():
        for group, part in groups.items():
            parts += [f"## {name.capitalize()}: {group} ({len(part.items)} pictures)", _main(part)]
    if outcome.type == "dreambench":
        parts += ["## Published (not measured here)", _published()]
    return "\n\n".join(parts) + "\n"


def partial_note(outcome: Outcome) -> str:
    """Says that it is no evaluation of the whole benchmark, and why."""
    total = len(outcome.items) + len(outcome.missing)
    return (
        f"**PARTIAL: {len(outcome.missing)} of {total} pictures are missing. These are not the "
        "numbers of this benchmark.** Missing: " + "; ".join(outcome.missing[:5])
    ) + (" ..." if len(outcome.missing) > 5 else "")


def _what(outcome: Outcome) -> str:
    counts = ", ".join(f"{number} {name}" for name, number in outcome.counts.items())
    rules = "; ".join(f"{name}: {rule}" for name, rule in outcome.rules.items())
    return f"{counts}. {rules[:1].upper()}{rules[1:]}."


def _main(outcome: Outcome) -> str:
    models: dict[str, Mapping[str, Estimate]] = dict(outcome.anchor_summaries)
    if outcome.baseline is not None:
        models[f"{outcome.baseline.name} (baseline)"] = outcome.baseline_summary
    models[outcome.name] = outcome.summary
    names = list(outcome.summary)
    rows = []
    for name in names:
        cells = [summary[name].text() if name in summary else "" for summary in models.values()]
        if outcome.baseline is not None:
            cells.append(outcome.changes[name].text(sign=True) if name in outcome.changes else "")
        rows.append([f"`{name}`", *cells])
    heads = ["", *models]
    if outcome.baseline is not None:
        heads.append(f"{outcome.name} - baseline")
    rows += _area(outcome, len(heads))
    return _table(heads, rows)


def _area(outcome: Outcome, width: int) -> list[list[str]]:
    own = outcome.hypervolume()
    if own is None:
        return []
    cells = [f"{own:.4f}"]
    if outcome.baseline is not None:
        other = outcome.hypervolume(outcome.baseline_summary)
        change = "" if other is None else f"{own - other:+.4f}"
        cells = ["" if other is None else f"{other:.4f}", *cells, change]
    return [["`hypervolume`", *[""] * (width - 1 - len(cells)), *cells]]


def _notes(outcome: Outcome) -> str:
    lines = [
        f"In brackets: 95 % interval of a bootstrap over subjects ({RESAMPLES:,} resamples, fixed "
        "seed); differences are paired, picture by picture.",
        "`reference`: similarity to the photo it was conditioned on; `photos`: to all real photos "
        "of the subject; `copy`: `reference` less the similarity to the other photos (0 is right, "
        "more is copying); `specific`: score by the own prompt less that by another one (0 is a "
        "model that ignores the prompt).",
    ]
    if outcome.baseline is None:
        lines.append("No baseline: evaluate the base model by this config and name its folder.")
    elif not outcome.baseline.complete:
        lines.append("**The baseline is PARTIAL.**")
    return "\n".join(f"* {line}" for line in lines)


def _published() -> str:
    rows = [[name, f"{dino:.3f}", f"{hps:.2f}"] for name, (dino, hps) in PUBLISHED.items()]
    return (
        "arXiv:2510.18263; HPSv3 and the last two rows are read off its figure (+-0.02). Harnesses "
        "differ: the same base has DINO .760 published and .707 in its author's own notebook. "
        "Compare within this evaluation only.\n\n"
    ) + _table(["published", "DINO", "HPSv3"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
