"""Tables of results, as Markdown and as the rows of the HTML report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from customized_grpo.config import read_config
from customized_grpo.config.names import BASE
from customized_grpo.evaluation.results import Results
from customized_grpo.evaluation.tables import Table
from customized_grpo.runs.alarms import ALARMS, counts


@dataclass(frozen=True, slots=True)
class Measure:
    """How a measure is shown."""

    name: str
    heading: str
    digits: int
    explanation: str


_SHARES = (
    Measure("prompt_right", "prompt right", 3,
            "share of pictures in which a classifier finds everything that was asked for"),
    Measure("subject_right", "subject right", 3,
            "share whose subject is most similar to a rendering of the right one as the prompt "
            "asks, among renderings of the others"),
    Measure("both_right", "both right", 3, "share that is right in both"),
    Measure("copies", "copies", 3,
            "share more similar to the whole reference than any ground truth is"),
)  # fmt: skip
_BOTH = _SHARES[2]
_OBJECTIVES = (
    Measure("hypervolume", "hypervolume", 4,
            "area that the (prompt, identity) point dominates above an unrelated picture"),
    Measure("joint/domination", "joint domination", 3,
            "share of examples better than the base on every objective"),
    Measure("joint/collapse", "joint collapse", 3,
            "share of examples worse than the base on every objective"),
    Measure("copy", "copy", 4,
            "similarity to the whole reference in excess of the ground truth's"),
)  # fmt: skip
_SUBJECT = (
    Measure("subject", "subject", 4,
            "similarity of the subject's region to a rendering of it as the prompt asks"),
    *(
        Measure(f"attribute/{name}", name, 3,
                f"how often an independent classifier finds the {name} that was asked for")
        for name in ("scene", "placement", "prop", "color", "accessory")
    ),
)  # fmt: skip
_QUALITY = (
    Measure("frechet", "Fréchet", 4,
            "distance of evaluator features to the ground truth's, smaller is better"),
    Measure("high_frequency", "high frequencies", 3,
            "energy of fine texture, ground truth = 1; a rise means grid artefacts"),
    Measure("diversity", "diversity", 4, "mean 1 - cosine between four pictures of one example"),
    Measure("hacking_gap/prompt", "gap prompt", 4,
            "gain by the rewarded model minus gain by the evaluator"),
    Measure("hacking_gap/identity", "gap identity", 4, "the same for the identity"),
)  # fmt: skip

_LEVELS = (0.3, 0.4, 0.5, 0.6)  # of both right, in validations
_CURVE = f"validation/share/{_BOTH.name}"

# Shares of samples in the paper (arXiv:2510.18263): conflicted, both positive, both negative.
_PAPER_SHARES = ("50.2 %", "26.8 %", "23.0 %")
_DIFFERENCES = (
    "±: seeds and, where it is a mean over them, examples (a bootstrap over subjects); of one "
    "seed, examples alone. **Bold**: three seeds at least, and the interval excludes 0."
)

_RANKING = (
    "By *both right*; differences are paired, over the seeds that both have. *first at 0.4*: "
    "updates and seconds of training until that share is first right in both in a validation, on "
    "other pictures, of subjects that are trained on; mean over the seeds that got there; —: "
    "never. Seconds compare on one machine with nothing else to do."
)


def tables(results: Results) -> list[Table]:
    """All tables that the results have numbers for."""
    return [table for some in sections(results).values() for table in some]


def sections(results: Results) -> dict[str, list[Table]]:
    """The same by where the page has them: ``right``, ``main`` and ``details``."""
    scores = [
        Measure(column, objective, 4, f"{objective} by the evaluator")
        for column, objective in results.yardstick.objectives.items()
        if column == results.yardstick.leading[objective]
    ]
    both = [*scores, *_OBJECTIVES]
    made = {
        "right": [
            _absolute(results, "Right pictures, and copies", _SHARES),
            ranking(results) if len(results.methods) > 1 else None,
        ],
        "main": [
            _absolute(results, "Both objectives", both),
            _against_base(results, [*_SHARES, *both]),
            _against_methods(results, [*_SHARES, *both]),
        ],
        "details": [
            _absolute(results, "The subject, and what the prompt asks for", _SUBJECT),
            _absolute(results, "Image quality that no reward sees, and reward hacking", _QUALITY),
            _conflicts(results),
        ],
    }
    return {place: [t for t in some if t is not None] for place, some in made.items()}


def ranking(results: Results) -> Table | None:
    """Methods and base, those with most pictures right in both first; None where none has any."""
    found = {method: results.over_seeds(method, _BOTH.name) for method in results.methods}
    means = {method: estimate.mean for method, estimate in found.items() if estimate}
    if not means:
        return None
    levels = _levels(results)
    rows = [
        _ranked(results, rank, method, levels)
        for rank, method in enumerate(sorted(means, key=means.__getitem__, reverse=True), start=1)
    ]
    if (base := results.yardstick.models.get(BASE)) is not None:
        values = results.yardstick.values(base)
        place = sum(mean > values[_BOTH.name] for mean in means.values())
        shown = {m: f"{values[m.name]:.{m.digits}f}" for m in _SHARES}
        both = shown.pop(_BOTH)
        rows.insert(place, [BASE, "", both, "", *shown.values(), *("" for _ in levels)])
    parts = (m.heading for m in _SHARES if m is not _BOTH)
    heads = ["", "seeds", _BOTH.heading, f"minus {results.labels[results.main]}", *parts]
    heads += [f"first at {level}" for level in levels]
    note = " ".join([_RANKING, _DIFFERENCES, *_cautions(results, list(means))])
    return Table(title="Ranking", note=note, heads=heads, rows=rows)


def _cautions(results: Results, ranked: Sequence[str]) -> list[str]:
    """What the differences do not say, in a sentence each."""
    main, others = results.main, [method for method in ranked if method != results.main]
    said: list[str] = []
    if not results.of(main) or not others:
        return said
    clear, together = (
        sum(
            found.is_clear(_BOTH.digits)
            for other in others
            if (found := results.over_seeds(other, _BOTH.name, main, comparisons)) is not None
        )
        for comparisons in (1, len(others))
    )
    if clear and len(others) > 1:
        said.append(
            f"An interval is of its difference alone: with such as hold for all {len(others)} at "
            f"once (Bonferroni) {together or 'none'} of the {clear} would be bold."
        )
    if not all(results.is_on_one_machine(other, main) for other in others):
        said.append(
            f"†: trained, at least in part, on another machine than {results.labels[main]}; a pair "
            "then shares prompts and noise, but not rounding, by which runs drift apart."
        )
    return said


def _levels(results: Results) -> list[float]:
    """Those of them at which not every run begins."""
    starts = [curve[0] for cell in results.cells if (curve := cell.curve.get(_CURVE))]
    return [level for level in _LEVELS if level > min(starts, default=0.0)]


def _ranked(results: Results, rank: int, method: str, levels: Sequence[float]) -> list[str]:
    both, *parts = _means(results, method, [_BOTH, *(m for m in _SHARES if m is not _BOTH)])
    (difference,) = _differences(results, method, results.main, [_BOTH])
    elsewhere = "" if results.is_on_one_machine(method, results.main) else " †"
    return [
        f"{rank}. {_emphasised(results, method)}{elsewhere}",
        str(len(results.of(method))),
        both,
        "" if method == results.main else difference,
        *parts,
        *(_first_at(results, method, level) for level in levels),
    ]


def _first_at(results: Results, method: str, level: float) -> str:
    """Means over the seeds that came so far, and how many did if not all."""
    cells = [cell for cell in results.of(method).values() if _CURVE in cell.curve]
    passed = [found for cell in cells if (found := cell.first_passes(_CURVE, level))]
    if not passed:
        return "—" if cells else ""
    updates, seconds = (fmean(column) for column in zip(*passed, strict=True))
    spent = "" if math.isnan(seconds) else f", {seconds:.0f} s"
    some = f" ({len(passed)} of {len(cells)})" if len(passed) < len(cells) else ""
    return f"{updates:.0f}{spent}{some}"


def alarms(results: Results) -> list[str]:
    """A sentence for all alarms of a kind, and one for every kind that runs looked for in vain."""
    raised: dict[str, list[str]] = {}
    looked = Counter[str]()
    for cell in results.cells:
        config = read_config(cell.config, f"{cell.method}/seed{cell.seed}")
        patience, by_count = config.faults.hacking_patience, counts(cell.alarms)
        looked.update({kind for kind, _ in by_count})
        for (kind, evaluator), column in by_count.items():
            rows = zip(cell.alarms["update"], column, strict=True)
            if updates := [update for update, count in rows if count >= patience]:
                raised.setdefault(kind, []).append(
                    f"{results.labels[cell.method]}, seed {cell.seed}, update {updates[0]} "
                    f"({evaluator} fell, {patience} validations in a row)"
                )
    said: list[str] = []
    for kind, alarm in ALARMS.items():
        if places := raised.get(kind):
            said.append(
                f"{alarm.name.capitalize()}, an evaluator fell while {alarm.rise} rose: "
                f"{'; '.join(sorted(places))}. {_runs(looked[kind]).capitalize()} looked for it."
            )
        elif looked[kind]:
            said.append(f"No alarm for {alarm.name} in {_runs(looked[kind])}.")
    return said


def _runs(count: int) -> str:
    return "one run" if count == 1 else f"{count} runs"


def markdown(results: Results) -> str:
    """All tables, with the number of seeds and examples."""
    seeds = ", ".join(f"{results.labels[m]} {len(results.of(m))}" for m in results.methods)
    intro = (
        f"{results.yardstick.describe()}. Mean over the seeds ± half-width of the 95 % confidence "
        f"interval (Student's t); differences take in the examples' spread. Seeds: {seeds}.\n"
    )
    said = [f"{text}\n" for text in alarms(results)]
    return "\n".join([intro, *said, *(table.markdown() for table in tables(results))])


def _known(results: Results, measures: Sequence[Measure]) -> list[Measure]:
    judged = [*results.yardstick.models.values(), *(cell.judgement for cell in results.cells[:1])]
    names = {name for judgement in judged for name in results.yardstick.values(judgement)}
    return [measure for measure in measures if measure.name in names]


def _heads(measures: Sequence[Measure]) -> list[str]:
    return ["", *(measure.heading for measure in measures)]


def _absolute(results: Results, title: str, measures: Sequence[Measure]) -> Table | None:
    measures = _known(results, measures)
    if not measures:
        return None
    rows = []
    for name, judgement in results.yardstick.models.items():
        values = results.yardstick.values(judgement)
        cells = [f"{values[m.name]:.{m.digits}f}" if m.name in values else "" for m in measures]
        rows.append([name, *cells])
    for method in results.methods:
        rows.append([_emphasised(results, method), *_means(results, method, measures)])
    note = "; ".join(f"*{m.heading}*: {m.explanation}" for m in measures) + "."
    return Table(title=title, note=note, heads=_heads(measures), rows=rows)


def _means(results: Results, method: str, measures: Sequence[Measure]) -> list[str]:
    means = [(results.over_seeds(method, m.name), m.digits) for m in measures]
    return [mean.plus_minus(digits) if mean else "" for mean, digits in means]


def _emphasised(results: Results, method: str) -> str:
    label = results.labels[method]
    return f"**{label}**" if method == results.main else label


def _against_base(results: Results, measures: Sequence[Measure]) -> Table:
    measures = [m for m in _known(results, measures) if not m.name.startswith("joint")]
    rows = [
        [_emphasised(results, method), *_differences(results, method, BASE, measures)]
        for method in results.methods
    ]
    own = "Tuned minus base. ±: half of the 95 % interval, over the examples."
    note = own if len(results.cells) == 1 else f"Method minus base. {_DIFFERENCES}"
    return Table(title="Change from the base", note=note, heads=_heads(measures), rows=rows)


def _against_methods(results: Results, measures: Sequence[Measure]) -> Table | None:
    measures = _known(results, measures)
    main, others = results.main, [m for m in results.methods if m != results.main]
    if not others or not results.of(main):
        return None
    rows = [
        [f"- {results.labels[other]}", *_differences(results, main, other, measures)]
        for other in others
    ]
    title = f"{results.labels[main]} minus the others, paired by seed"
    return Table(title=title, note=_DIFFERENCES, heads=_heads(measures), rows=rows)


def _differences(
    results: Results, method: str, other: str, measures: Sequence[Measure]
) -> list[str]:
    cells = []
    for measure in measures:
        interval = results.over_seeds(method, measure.name, minus=other)
        text = interval.plus_minus(measure.digits, sign=True) if interval else ""
        cells.append(f"**{text}**" if interval and interval.is_clear(measure.digits) else text)
    return cells


def _conflicts(results: Results) -> Table | None:
    rows = []
    for method in results.methods:
        cells = [cell.shares for cell in results.of(method).values() if cell.shares]
        if cells:
            names = [name for name in cells[0] if name != "update"]
            values = [[share for cell in cells for share in cell[name]] for name in names]
            means = (f"{sum(v) / len(v):.1%}".replace("%", " %") for v in values)
            rows.append([results.labels[method], *means])
    if not rows:
        return None
    return Table(
        title="Samples by the signs of their advantages",
        note="Mean over all rollouts of a run and all seeds.",
        heads=["", "conflicted", "both positive", "both negative"],
        rows=[*rows, ["paper, FLUX (published)", *_PAPER_SHARES]],
    )
