"""Tables of results, as Markdown and as the rows of the HTML report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from customized_grpo.config import read_config
from customized_grpo.evaluation.outcome import BASE
from customized_grpo.evaluation.results import Results
from customized_grpo.evaluation.tables import Table


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

# Shares of samples in the paper (arXiv:2510.18263): conflicted, both positive, both negative.
_PAPER_SHARES = ("50.2 %", "26.8 %", "23.0 %")
_DIFFERENCES = (
    "±: seeds and, where it is a mean over them, examples (a bootstrap over subjects); of one "
    "seed, examples alone. **Bold**: three seeds at least, and the interval excludes 0."
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
        "right": [_absolute(results, "Right pictures, and copies", _SHARES)],
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


def alarms(results: Results) -> list[str]:
    """A sentence for every hacking alarm of a run; that there was none, of those that looked."""
    looked = [cell for cell in results.cells if cell.alarms]
    found = []
    for cell in looked:
        config = read_config(cell.config, f"{cell.method}/seed{cell.seed}")
        updates, patience = cell.alarms["update"], config.faults.hacking_patience
        for name in cell.alarms.keys() - {"update"}:
            rows = zip(updates, cell.alarms[name], strict=True)
            raised = [update for update, count in rows if count >= patience]
            if raised:
                found.append(
                    f"Hacking alarm: {results.labels[cell.method]}, seed {cell.seed}, update "
                    f"{raised[0]}: {name.removeprefix('hacking/')} fell while a reward of its "
                    f"objective rose, {patience} validations in a row."
                )
    return sorted(found) or ([f"No hacking alarm in {len(looked)} runs."] if looked else [])


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
        means = [(results.over_seeds(method, m.name), m.digits) for m in measures]
        cells = [mean.plus_minus(digits) if mean else "" for mean, digits in means]
        rows.append([_emphasised(results, method), *cells])
    note = "; ".join(f"*{m.heading}*: {m.explanation}" for m in measures) + "."
    return Table(title=title, note=note, heads=_heads(measures), rows=rows)


def _emphasised(results: Results, method: str) -> str:
    label = results.labels[method]
    return f"**{label}**" if method == results.main else label


def _against_base(results: Results, measures: Sequence[Measure]) -> Table:
    measures = [m for m in _known(results, measures) if not m.name.startswith("joint")]
    rows = [
        [_emphasised(results, method), *_differences(results, method, BASE, measures)]
        for method in results.methods
    ]
    note = f"Method minus base. {_DIFFERENCES}"
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
