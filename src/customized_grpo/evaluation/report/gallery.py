"""One HTML page of pictures chosen by a fixed rule: the worst, the median and the best."""

from __future__ import annotations

import base64
import html
from io import BytesIO

from torch import Tensor

from customized_grpo.evaluation.items import BenchmarkSet, Photo
from customized_grpo.evaluation.manifest import Outputs
from customized_grpo.evaluation.outcome import Outcome
from customized_grpo.evaluation.tables import partial_note
from customized_grpo.pictures import to_pil
from customized_grpo.types import crop_and_resize

_SHOWN = 6  # of each kind
_SIDE = 192
_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1300px; padding: 0 1em }
figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top;
  width: 392px; max-width: 100% }
figcaption { font-size: 13px; overflow-wrap: anywhere }
img { border-radius: 4px; margin-right: 1%; max-width: 49% }
.partial { background: #fdd; padding: .5em 1em }
"""


def gallery(outcome: Outcome, wanted: BenchmarkSet, outputs: Outputs) -> str:
    """The page: pictures in the order of each objective's leading number."""
    parts = [f"<h1>{html.escape(outcome.name)} on {html.escape(outcome.type)}</h1>"]
    if outcome.missing:
        parts.append(
            f'<p class="partial">{html.escape(partial_note(outcome).replace("*", ""))}</p>'
        )
    parts.append(
        "<p>On the left the reference, on the right the picture. By rule: pictures in the order of "
        f"one number, equal ones in the benchmark's order; the first, the middle and the last "
        f"{_SHOWN}.</p>"
    )
    for objective, name in outcome.leading.items():
        parts.append(f"<h2>{html.escape(objective)}: {html.escape(name)}</h2>")
        for heading, rows in chosen(outcome.columns[name]).items():
            figures = "\n".join(_figure(outcome, wanted, outputs, row) for row in rows)
            parts.append(f"<h3>{heading}</h3>\n{figures}")
    title = html.escape(outcome.name)
    phone = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{phone}<title>{title}</title><style>\n{_STYLE}</style>'
    return (
        f"<!doctype html>\n<html><head>{head}</head><body>\n"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def chosen(column: Tensor) -> dict[str, list[int]]:
    """Rows of the worst, the median and the best by one number; those without it are left out."""
    values = column.tolist()
    order = sorted(
        (row for row, value in enumerate(values) if value == value), key=lambda row: values[row]
    )
    count = min(_SHOWN, len(order))
    middle = (len(order) - count) // 2
    return {
        "worst": order[:count],
        "median": order[middle : middle + count],
        "best": order[len(order) - count :][::-1],
    }


def _figure(outcome: Outcome, wanted: BenchmarkSet, outputs: Outputs, row: int) -> str:
    item = outcome.items[row]
    reference = _img(wanted.references(item)[0], "reference")
    pictures = reference + _img(outputs.photos[row], "picture")
    numbers = ", ".join(
        f"{name} {column[row].item():.3f}"
        for name, column in outcome.columns.items()
        if not column[row].isnan()
    )
    text = f"<b>{html.escape(item.prompt)}</b><br>{html.escape(item.describe())}<br>{numbers}"
    return f"<figure>{pictures}<figcaption>{text}</figcaption></figure>"


def _img(photo: Photo, what: str) -> str:
    pixels = crop_and_resize(photo.picture.load(), _SIDE, _SIDE)
    buffer = BytesIO()
    to_pil(pixels).save(buffer, format="JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="{_SIDE}" src="data:image/jpeg;base64,{data}" alt="{what}">'
