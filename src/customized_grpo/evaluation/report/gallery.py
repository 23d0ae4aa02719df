"""One HTML page of pictures chosen by a fixed rule: the worst, the median and the best."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

from torch import Tensor

from customized_grpo.evaluation.items import BenchmarkSet, Photo
from customized_grpo.evaluation.manifest import Outputs
from customized_grpo.evaluation.outcome import Outcome
from customized_grpo.evaluation.report.page import render
from customized_grpo.evaluation.tables import partial_note
from customized_grpo.pictures import to_pil
from customized_grpo.types import crop_and_resize

_SHOWN = 6  # of each kind
_SIDE = 192


def gallery(outcome: Outcome, wanted: BenchmarkSet, outputs: Outputs) -> str:
    """The page: pictures in the order of each objective's leading number."""
    sections = [
        (
            objective,
            name,
            {
                kind: [_figure(outcome, wanted, outputs, row) for row in rows]
                for kind, rows in chosen(outcome.own.tensors[name]).items()
            },
        )
        for objective, name in outcome.yardstick.leading.items()
    ]
    return render(
        "gallery.html.j2",
        title=f"{outcome.name} on {outcome.yardstick.set}",
        partial=partial_note(outcome) if outputs.missing else "",
        count=_SHOWN,
        sections=sections,
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


def _figure(outcome: Outcome, wanted: BenchmarkSet, outputs: Outputs, row: int) -> dict[str, Any]:
    item = outputs.items[row]
    numbers = {name: column[row] for name, column in outcome.own.columns.items()}
    return {
        "images": {
            "reference": _jpeg(wanted.references(item)[0]),
            "picture": _jpeg(outputs.photos[row]),
        },
        "prompt": item.prompt,
        "item": item.describe(),
        "numbers": ", ".join(
            f"{n} {value:.3f}" for n, value in numbers.items() if value is not None
        ),
    }


def _jpeg(photo: Photo) -> str:
    """A thumbnail as base64."""
    buffer = BytesIO()
    to_pil(crop_and_resize(photo.picture.load(), _SIDE, _SIDE)).save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
