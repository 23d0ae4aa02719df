"""Tables: Markdown for files and pages, aligned text for terminals; what evaluations show in them.

Those of a study are in ``report.tables``.
"""

from __future__ import annotations

from dataclasses import dataclass

from customized_grpo.config.names import BASE
from customized_grpo.evaluation.outcome import Judgement, Origin, Outcome
from customized_grpo.evaluation.statistics import RESAMPLES
from customized_grpo.ops.significance import standard_error
from customized_grpo.rewards.truth import SHARES

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table with a title and a sentence on what it says; the first column names the row."""

    title: str = ""
    note: str = ""
    heads: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """GitHub's flavour."""
        lines = [self.heads, ["---"] + ["---:"] * (len(self.heads) - 1), *self.rows]
        escaped = ([cell.replace("|", r"\|") for cell in cells] for cells in lines)
        body = "\n".join("| " + " | ".join(cells) + " |" for cells in escaped)
        return f"### {self.title}\n\n{self.note}\n\n{body}\n" if self.title else body

    def aligned(self) -> str:
        """Plain text."""
        lines = [self.heads, *self.rows]
        widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
        return "\n".join(
            "".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
            for first, *cells in lines
        )


def run_table(outcome: Outcome) -> str:
    """Plain text: a row per measure, a column per model, the paired change with its error.

    Shares of right pictures come first, where their data know what is right.
    """
    yardstick = outcome.yardstick
    columns = {name: yardstick.values(judged) for name, judged in outcome.models.items()}
    headings = {name: f"{objective} ({name})" for name, objective in yardstick.objectives.items()}
    rows = []
    for name in dict.fromkeys(name for values in columns.values() for name in values):
        cells = [f"{values[name]:z.4f}" if name in values else "" for values in columns.values()]
        if name in SHARES:
            cells[-2:] = [_share(outcome.models[model], name) for model in list(columns)[-2:]]
        change = ""
        if name in outcome.own.columns:
            mean, error = outcome.change(name)
            change = f"{mean:+z.4f} ± {error:.4f}"
        rows.append([headings.get(name, name), *cells, change])
    heads = ["", *columns, f"{outcome.name} - {yardstick.base_name}"]
    note = f"{yardstick.describe()}; ±: standard error, of a mean or of the paired difference"
    return f"{Table(heads=heads, rows=rows).aligned()}\n{note}"


def share_table(outcome: Outcome) -> str:
    """Plain text: the shares of right pictures of base and tuned alone, then what follows."""
    names = [name for name in SHARES if name in outcome.own.columns]
    rows = []
    for name in names:
        mean, error = outcome.change(name)
        known = (outcome.models[model] for model in (BASE, outcome.name))
        shares = (_share(judged, name) for judged in known)
        rows.append([name.replace("_", " "), *shares, f"{mean:+z.3f} ± {error:.3f}"])
    table = Table(heads=["", BASE, outcome.name, "change"], rows=rows).aligned()
    return f"{table}\n{outcome.yardstick.describe()}; ± is the standard error"


def verdict(outcome: Outcome) -> str:
    """One sentence for people: whether the model differs from the base at all, and in what.

    Where the data know what is right, in how many more pictures all is; else by the objectives'
    leading evaluators. "" where there is nothing to compare with.
    """
    if "both_right" in outcome.changes:
        return _verdict_of_shares(outcome)
    leading = outcome.yardstick.leading
    known = {o: column for o, column in leading.items() if column in outcome.changes}
    if not known:
        return ""
    numbers = {o: "{:+z.4f} ± {:.4f}".format(*outcome.change(c)) for o, c in known.items()}
    if not makes_a_difference(outcome):
        texts = ", ".join(f"{objective} {number}" for objective, number in numbers.items())
        pair = f"{outcome.name} and {outcome.yardstick.base_name}"
        return f"No difference to speak of between {pair}: {texts}."
    parts = []
    for objective, column in known.items():
        word = "better" if outcome.change(column)[0] > 0 else "worse"
        word = word if outcome.differs(column) else "no different to speak of"
        parts.append(f"{word} in {objective} ({numbers[objective]})")
    return f"{outcome.name} is {', '.join(parts)}."


def makes_a_difference(outcome: Outcome) -> bool:
    """Whether what ``verdict`` begins with has changed: both right, or a leading evaluator."""
    shares, leading = ("both_right",), outcome.yardstick.leading.values()
    names = shares if "both_right" in outcome.changes else leading
    return any(outcome.differs(name) for name in names if name in outcome.changes)


def _verdict_of_shares(outcome: Outcome) -> str:
    names = [name for name in SHARES if name in outcome.changes and outcome.differs(name)]
    points = {name: 100 * outcome.change(name)[0] for name in names}
    gain = points.pop("both_right", None)
    rest = ", ".join(f"{n.replace('_', ' ')} {change:+.0f}" for n, change in points.items())
    what = "pictures show the right subject as the prompt asks"
    if gain is None:
        return f"No difference to speak of in how many {what} ({rest or 'nor in its parts'})."
    more = f"{abs(gain):.0f} {'more' if gain > 0 else 'fewer'} of 100 {what}"
    return f"{more} ({rest})." if rest else f"{more}."


def _share(judged: Judgement, name: str) -> str:
    column = judged.tensors[name]
    return f"{column.nanmean().item():.3f} ± {standard_error(column):.3f}"


def benchmark_markdown(outcome: Outcome) -> str:
    """The whole document: anchors, baseline and model side by side, intervals, groups."""
    origin = outcome.origin
    assert origin is not None
    parts = [f"# {outcome.name} on {outcome.yardstick.set}", _what(origin)]
    if origin.missing:
        parts.append(partial_note(outcome))
    parts += ["## All pictures", _models(outcome), _notes(outcome)]
    for name, groups in outcome.groups.items():
        for group, part in groups.items():
            count = len(part.yardstick.items)
            parts += [f"## {name.capitalize()}: {group} ({count} pictures)", _models(part)]
    if outcome.yardstick.set == "dreambench":
        parts += ["## Published (not measured here)", _published()]
    return "\n\n".join(parts) + "\n"


def partial_note(outcome: Outcome) -> str:
    """Says that it is no evaluation of the whole benchmark, and why."""
    missing = () if outcome.origin is None else outcome.origin.missing
    total = len(outcome.yardstick.items) + len(missing)
    return (
        f"**PARTIAL: {len(missing)} of {total} pictures are missing. These are not the "
        "numbers of this benchmark.** Missing: " + "; ".join(missing[:5])
    ) + (" ..." if len(missing) > 5 else "")


def _what(origin: Origin) -> str:
    counts = ", ".join(f"{number} {name}" for name, number in origin.counts.items())
    rules = "; ".join(f"{name}: {rule}" for name, rule in origin.rules.items())
    return f"{counts}. {rules[:1].upper()}{rules[1:]}."


def _models(outcome: Outcome) -> str:
    """A row per column, a column per model; the hypervolume last."""
    yardstick = outcome.yardstick
    summaries = {name: yardstick.summary(judged) for name, judged in outcome.models.items()}
    heads, rows = ["", *summaries], []
    for name in outcome.summary:
        cells = [s[name].in_brackets() if name in s else "" for s in summaries.values()]
        rows.append([f"`{name}`", *cells])
    areas = [yardstick.hypervolume(judged) for judged in outcome.models.values()]
    if areas[-1] is not None:
        rows.append(["`hypervolume`", *("" if a is None else f"{a:.4f}" for a in areas)])
    if yardstick.base is not None:
        heads.append(f"{outcome.name} - baseline")
        for name, row in zip([*outcome.summary, ""], rows, strict=False):
            change = outcome.changes.get(name)
            row.append("" if change is None else change.in_brackets(sign=True))
        if areas[-1] is not None and areas[-2] is not None:
            rows[-1][-1] = f"{areas[-1] - areas[-2]:+.4f}"
    return Table(heads=heads, rows=rows).markdown()


def _notes(outcome: Outcome) -> str:
    lines = [
        f"In brackets: 95 % interval of a bootstrap over subjects ({RESAMPLES:,} resamples, fixed "
        "seed); differences are paired, picture by picture.",
        "`reference`: similarity to the photo it was conditioned on; `photos`: to all real photos "
        "of the subject; `copy`: `reference` less the similarity to the other photos (0 is right, "
        "more is copying); `specific`: score by the own prompt less that by another one (0 is a "
        "model that ignores the prompt).",
    ]
    if outcome.yardstick.base is None:
        lines.append("No baseline: evaluate the base model by this config and name its folder.")
    elif outcome.origin is not None and outcome.origin.base_is_partial:
        lines.append("**The baseline is PARTIAL.**")
    return "\n".join(f"* {line}" for line in lines)


def _published() -> str:
    rows = [[name, f"{dino:.3f}", f"{hps:.2f}"] for name, (dino, hps) in PUBLISHED.items()]
    return (
        "arXiv:2510.18263; HPSv3 and the last two rows are read off its figure (± 0.02). Harnesses "
        "differ: the same base has DINO .760 published and .707 in its author's own notebook. "
        "Compare within this evaluation only.\n\n"
    ) + Table(heads=["published", "DINO", "HPSv3"], rows=rows).markdown()
