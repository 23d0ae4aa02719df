"""Subjects200K (OminiControl, arXiv:2411.15098): pairs of pictures of one subject.

Columns as on huggingface.co/datasets/Yuanshi/Subjects200K: ``image`` (two square pictures side by
side with padding around and between), ``collection``, ``quality_assessment`` (compositeStructure,
objectConsistency, imageQuality: 0-5) and ``description`` (item, description_0 of the left picture,
description_1 of the right one, category, description_valid).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import Field
from torch import Tensor

from customized_grpo.config import DataConfig, Host
from customized_grpo.config.limits import FilePath
from customized_grpo.data.hub import load_rows
from customized_grpo.data.images import kept_size, opened, to_tensor, upright
from customized_grpo.data.listed import Entry, ListedSource
from customized_grpo.data.splits import split_by_subject
from customized_grpo.data.syncd import Share
from customized_grpo.errors import DataError

_SCORES = ("compositeStructure", "objectConsistency", "imageQuality")
_COLUMNS = ("image", "collection", "quality_assessment", "description")
_GRID = 64  # the pictures' sides, 512 and 1024, are multiples of it, and the padding is narrower


@dataclass(frozen=True, kw_only=True, slots=True)
class Subjects200KConfig(DataConfig):
    """Reference = the left picture of a pair, prompt = the description of the right one."""

    type: Literal["subjects200k"] = "subjects200k"  # pyright: ignore
    path: FilePath = "Yuanshi/Subjects200K"
    """Hub id, or a folder with its parquet files."""
    collection: str | None = None
    """`collection_1`, `collection_2` or `collection_3`; null = all there are."""
    min_quality: Annotated[int, Field(ge=0, le=5)] = 5
    """Least of the three scores of a pair; 0 = take pairs without scores too."""
    held_out: Share = 0.05
    """Share of the items to evaluate on; as many more are for validation."""

    def hosts(self) -> tuple[Host, ...]:
        """See Plug: the hub, unless the dataset lies in a folder."""
        return () if Path(self.path).is_dir() else (Host(url="https://huggingface.co"),)

    def build(self, seed: int) -> ListedSource:
        """Opens the dataset and selects by its texts and scores; pictures are read when needed."""
        texts = [column for column in _COLUMNS if column != "image"]
        rows = load_rows(self.path, texts, ["image"], who="type: subjects200k")
        described = enumerate(rows.select_columns(texts))
        wanted = {index: row for index, row in described if self._wanted(row)}
        if not wanted:
            raise DataError(f"{self.path}: no pair is left; lower min_quality or set collection")
        pairs = Pairs(self.path, rows, next(iter(wanted)))
        entries = [
            Entry(
                id=f"{self.path}/{index}",
                prompt=row["description"]["description_1"].strip(),
                subject=row["description"]["item"].strip(),
                references=(LeftPicture(pairs, index),),
            )
            for index, row in wanted.items()
        ]
        items = [entry.subject for entry in entries]
        splits = split_by_subject(entries, items, self.held_out)
        if not splits.training:
            raise DataError(f"{self.path}: must show at least two items, got one")
        remark = (
            f"{self.path}: {len(wanted)} of {len(rows)} pairs are used, the others are of another "
            "collection, not valid, without a text, or below min_quality"
        )
        return ListedSource(splits, seed, "use more data: it gets a share of the items", [remark])

    def _wanted(self, row: dict[str, Any]) -> bool:
        text, quality = row["description"] or {}, row["quality_assessment"] or {}
        if self.collection not in (None, row["collection"]):
            return False
        if text.get("description_valid") is False:
            return False
        if not all((text.get(key) or "").strip() for key in ("item", "description_1")):
            return False
        return all((quality.get(key) or 0) >= self.min_quality for key in _SCORES)


class Pairs:
    """The pictures of a dataset, all of one size."""

    def __init__(self, name: str, rows: Any, first: int) -> None:
        self.name, self._rows = name, rows
        self.side = self.left(first).height

    def left(self, index: int) -> Image.Image:
        """The left picture of a row: the padding around it is as wide on the left as on top.

        Raises:
            DataError: if it cannot be read or is no pair.
        """
        where = f"{self.name}: row {index}: image"
        source = self._rows[index]["image"]
        with opened(io.BytesIO(source["bytes"]), where) as image:
            pair = upright(image, "RGB", where)
        side = pair.height // _GRID * _GRID
        padding = (pair.height - side) // 2
        if not side or pair.width < 2 * side:
            raise DataError(
                f"{where} must be two square pictures side by side, got {pair.width} x "
                f"{pair.height}; leave it out"
            )
        return pair.crop((padding, padding, padding + side, padding + side))


@dataclass(frozen=True, slots=True, eq=False)
class LeftPicture:
    """The left picture of a pair, read from its row when it is needed."""

    pairs: Pairs
    index: int

    @property
    def height(self) -> int:
        """Pixels of a side."""
        return kept_size(self.pairs.side, self.pairs.side)[0]

    @property
    def width(self) -> int:
        """See height."""
        return self.height

    def load(self) -> Tensor:
        """Pixels ``[3, S, S]`` float32 in [0, 1].

        Raises:
            DataError: if it cannot be read, or its size is not that of the others.
        """
        picture = self.pairs.left(self.index)
        if picture.height != self.pairs.side:
            raise DataError(
                f"{self.pairs.name}: row {self.index}: image must have pictures of "
                f"{self.pairs.side} px as the first row, got {picture.height}; set collection"
            )
        return to_tensor(picture)
