"""Self-contained HTML pages, and the report of a study or of runs with its figures as PNG."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from customized_grpo.errors import needs_extra
from customized_grpo.evaluation.evaluate import NUM_SHOWN, Place
from customized_grpo.evaluation.judge import REFERENCE
from customized_grpo.evaluation.outcome import BASE, TRUTH, TUNED
from customized_grpo.evaluation.results import Results
from customized_grpo.files import write_atomic

_SHARED_STRIPS = (REFERENCE, TRUTH, BASE)


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


def study_pictures(results: Results, folder: Path) -> dict[str, Path]:
    """Heading -> strip of pictures, from a study's results."""
    names = {name: name.replace(" ", "-") for name in _SHARED_STRIPS}
    names |= {results.labels[method]: method for method in results.methods}
    return {heading: folder / "pictures" / f"{name}.png" for heading, name in names.items()}


def run_pictures(runs: Sequence[Path]) -> dict[str, Path]:
    """Heading -> strip of pictures, from evaluated run folders."""
    shared = {name: Place(runs[0], "held_out").strip(name) for name in _SHARED_STRIPS}
    return shared | {str(run): Place(run, "held_out").strip(TUNED) for run in runs}


def write_report(
    results: Results, folder: Path, command: str, pictures: Mapping[str, Path]
) -> Path:
    """Writes ``report.html``, ``tables.md`` and ``figures/*.png``; returns the page.

    ``command`` is what the reader can repeat it with; ``pictures`` maps headings to strips of
    pictures of the examples, left out where there is no file.
    """
    check_extra()
    from customized_grpo.evaluation.report.figures import figures, to_png, to_svg
    from customized_grpo.evaluation.report.tables import markdown, tables

    drawn = figures(results)
    for name, figure in drawn.items():
        _write(folder / "figures" / f"{name}.png", to_png(figure))
    prompts = [item.prompt for item in results.yardstick.items[:NUM_SHOWN]]
    page = render(
        "report.html.j2",
        title=results.name,
        results=results,
        prompts=prompts,
        tables=tables(results),
        figures={name: to_svg(figure) for name, figure in drawn.items()},
        pictures={
            heading: _cut(file, len(prompts)) for heading, file in pictures.items() if file.exists()
        },
        versions=_versions(results),
        command=command,
        configs={c.method: c.config for c in reversed(results.cells)},
    )
    _write(folder / "tables.md", markdown(results).encode())
    _write(folder / "report.html", page.encode())
    return folder / "report.html"


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


def _cut(strip: Path, count: int) -> list[str]:
    """The pictures of a strip as base64."""
    from PIL import Image

    parts = []
    with Image.open(strip) as image:
        width = image.width // count
        for number in range(count):
            buffer = BytesIO()
            part = image.crop((number * width, 0, (number + 1) * width, image.height))
            part.save(buffer, format="PNG", optimize=True)
            parts.append(base64.b64encode(buffer.getvalue()).decode())
    return parts
