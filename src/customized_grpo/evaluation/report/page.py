"""Self-contained HTML pages, and the report of a study or of runs with its figures as PNG."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from customized_grpo.config import parse_yaml
from customized_grpo.config.names import BASE, REFERENCE, TRUTH
from customized_grpo.errors import needs_extra
from customized_grpo.evaluation.evaluate import NUM_SHOWN, Place
from customized_grpo.evaluation.marks import marks
from customized_grpo.evaluation.outcome import TUNED, Judgement, Outcome
from customized_grpo.evaluation.results import Cell, Results
from customized_grpo.evaluation.tables import verdict
from customized_grpo.files import write_atomic
from customized_grpo.pictures import Mark, png, read_strip
from customized_grpo.runs.sinks.masking import config_without_secrets


@dataclass(frozen=True, slots=True)
class Shown:
    """One model's pictures of the examples that are shown."""

    strip: Path
    judged: Judgement | None = None
    """What says which of them are wrong; None: that is no question."""


@dataclass(frozen=True, slots=True)
class _Cell:
    """A picture as base64, and what is wrong with it."""

    data: str
    marks: Sequence[Mark]


def check_extra() -> None:
    """Makes sure that a report can be written.

    Raises:
        ConfigError: if the packages of the extra ``report`` are missing.
    """
    with needs_extra("report", "a report"):
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401


def render(template: str, **values: object) -> str:
    """A page that needs no other file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["emphasis"] = _emphasis
    return environment.get_template(template).render(values)


def study_pictures(results: Results, folder: Path) -> dict[str, Shown]:
    """Heading -> pictures, from a study's results; seed 0 of every method."""
    cells = {method: results.of(method).get(0) for method in results.methods}
    own = {
        results.labels[method]: Shown(_strip(folder, method), cell.judgement)
        for method, cell in cells.items()
        if cell is not None
    }
    return _with_shared(results, own, lambda name: _strip(folder, name))


def _strip(folder: Path, name: str) -> Path:
    return folder / "pictures" / f"{name.replace(' ', '-')}.png"


def run_pictures(results: Results, runs: Sequence[Path]) -> dict[str, Shown]:
    """Heading -> pictures, from the evaluated run folders that the results are of."""
    own = {
        _heading(results, cell): Shown(Place(run, "held_out").strip(TUNED), cell.judgement)
        for run, cell in zip(runs, results.cells, strict=True)
    }
    return _with_shared(results, own, Place(runs[0], "held_out").strip)


def _heading(results: Results, cell: Cell) -> str:
    label = results.labels[cell.method]
    return f"{label}, seed {cell.seed}" if len(results.of(cell.method)) > 1 else label


def _with_shared(
    results: Results, own: Mapping[str, Shown], strip: Callable[[str], Path]
) -> dict[str, Shown]:
    judged = results.yardstick.models
    reference, base, truth = (Shown(strip(n), judged.get(n)) for n in (REFERENCE, BASE, TRUTH))
    return {REFERENCE: reference, BASE: base, **own, TRUTH: truth}


def write_report(
    results: Results, folder: Path, command: str, pictures: Mapping[str, Shown]
) -> Path:
    """Writes ``report.html``, ``tables.md`` and ``figures/*.png``; returns the page.

    ``command`` is what the reader can repeat it with; ``pictures`` maps headings to what is
    shown under them, left out where there is no file.
    """
    check_extra()
    from customized_grpo.evaluation.report.figures import figures, has_bands, to_png, to_svg
    from customized_grpo.evaluation.report.tables import alarms, markdown, sections

    drawn = figures(results)
    for name, figure in drawn.items():
        _write(folder / "figures" / f"{name}.png", to_png(figure))
    prompts = [item.prompt for item in results.yardstick.items[:NUM_SHOWN]]
    cells = {
        heading: _cells(shown, len(prompts))
        for heading, shown in pictures.items()
        if shown.strip.exists()
    }
    has_seeds = max((len(results.of(m)) for m in results.methods), default=0) > 1
    page = render(
        "report.html.j2",
        title=results.name,
        results=results,
        prompts=prompts,
        tables=sections(results),
        figures={name: to_svg(figure) for name, figure in drawn.items()},
        pictures=cells,
        verdict=_verdict(results),
        has_seeds=has_seeds,
        has_bands=has_seeds and has_bands(results),
        truth=TRUTH in results.yardstick.anchors,
        alarms=alarms(results),
        legend=dict.fromkeys(m for column in cells.values() for cell in column for m in cell.marks),
        versions=_versions(results),
        command=command,
        configs={
            c.method: config_without_secrets(parse_yaml(c.config, "config"))
            for c in reversed(results.cells)
        },
    )
    _write(folder / "tables.md", markdown(results).encode())
    _write(folder / "report.html", page.encode())
    return folder / "report.html"


def _verdict(results: Results) -> str:
    """Of a single run; "" of several, which tables compare."""
    if len(results.cells) != 1:
        return ""
    own = results.cells[0].judgement
    return verdict(Outcome(name=TUNED, own=own, yardstick=results.yardstick))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)


def _emphasis(text: str) -> str:
    """Markdown's * and ** to HTML, the rest escaped."""
    escaped = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
    return re.sub(r"\*(.+?)\*", r"<i>\1</i>", escaped)


def _versions(results: Results) -> str:
    pairs = [pair for cell in results.cells for pair in cell.environment.items()]
    shown = [f"{name} {value}" for name, value in pairs if name not in ("device", "threads")]
    return ", ".join(dict.fromkeys(shown))


def _cells(shown: Shown, count: int) -> list[_Cell]:
    wrong = [()] * count if shown.judged is None else marks(shown.judged, count)
    return [
        _Cell(base64.b64encode(png(image)).decode(), some)
        for image, some in zip(read_strip(shown.strip, count), wrong, strict=True)
    ]
