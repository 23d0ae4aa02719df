"""Datasets of the Hugging Face hub, or in folders of the same form, by the library `datasets`."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from torch import Tensor

from customized_grpo.data.images import Mode, opened, size_of, to_tensor, upright
from customized_grpo.errors import ConfigError, DataError, needs_extra
from customized_grpo.files import read_text

_METADATA = ("metadata.csv", "metadata.jsonl")  # what the library reads beside pictures


def load_rows(
    path: str,
    texts: Sequence[str],
    pictures: Sequence[str],
    *,
    who: str,
    subset: str | None = None,
    split: str = "train",
    streaming: bool = False,
) -> Any:
    """The rows of a dataset with some of its columns; pictures are bytes.

    Args:
        path: hub id, or a folder.
        texts: columns.
        pictures: columns of a picture or of a list of pictures.
        who: asks, as a message says it.
        subset: of the dataset, where it has several.
        split: of the dataset.
        streaming: read rows as they are asked for, in order; nothing is kept on disk.

    Raises:
        ConfigError: if there is no such dataset, or the library is missing.
        DataError: if it lacks a column, one of pictures holds something else, or text in a folder
            is not UTF-8.
    """
    with needs_extra("datasets", who):
        import datasets
    _check_texts(Path(path))
    try:
        rows = datasets.load_dataset(path, subset, split=split, streaming=streaming)
        names = list(rows.column_names or next(iter(rows), {}))
    except Exception as error:  # of the library, of the hub's client and of its proxies
        raise ConfigError(
            f"path: must be a hub id or a folder of parquet files, got {path!r}: "
            + " ".join(str(error).split())
        ) from error
    wanted = list(dict.fromkeys([*texts, *pictures]))
    if missing := [name for name in wanted if name not in names]:
        raise DataError(f"{path}: must have the columns {wanted}, misses {missing} of {names}")
    rows = rows.select_columns(wanted)
    for name in pictures:
        feature = (rows.features or {}).get(name)
        if (encoded := _encoded(feature)) is None:
            raise DataError(f"{path}: {name}: must hold pictures or lists of them, got {feature}")
        rows = rows.cast_column(name, encoded)
    return rows


def as_texts(rows: Any, path: str, column: str, *, lists: bool = True) -> Any:
    """The rows with a column of texts, or maybe lists of them; class labels become their names.

    Raises:
        DataError: if the column holds something else.
    """
    import datasets

    known = rows.features
    feature = known[column]
    is_list = lists and isinstance(feature, (datasets.List, datasets.LargeList))
    kind = feature.feature if is_list else feature
    if isinstance(kind, datasets.ClassLabel):

        def named(value: Any) -> Any:
            if isinstance(value, list):
                return [named(item) for item in value]
            return None if value is None or value < 0 else kind.int2str(value)

        if not isinstance(rows, datasets.IterableDataset):  # whose pictures `map` would copy
            return rows.remove_columns(column).add_column(column, list(map(named, rows[column])))
        text = datasets.Value("string")
        features = {**known, column: datasets.List(text) if is_list else text}
        read = datasets.Features(features)
        return rows.map(lambda row: {column: named(row[column])}, features=read)
    if isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string", "null"):
        return rows
    raise DataError(
        f"{path}: {column}: must hold texts{' or lists of them' * lists}, got {feature}; name "
        "another column, or store it as text"
    )


def _check_texts(folder: Path) -> None:
    """Raises a DataError if captions beside pictures are not UTF-8: the library names no line."""
    for file in sorted(folder.rglob("metadata.*")) if folder.is_dir() else ():
        if file.name in _METADATA:
            read_text(file)


def _encoded(feature: Any) -> Any:
    """The type of a column of pictures or lists of them that are not decoded; None: of others."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
        return datasets.List(datasets.Image(decode=False), feature.length)
    if isinstance(feature, datasets.LargeList) and isinstance(feature.feature, datasets.Image):
        return datasets.LargeList(datasets.Image(decode=False))
    return None


@dataclass(frozen=True, slots=True, eq=False)
class StoredPicture:
    """A picture in a row, which has been checked; its pixels are read when they are needed."""

    content: Callable[[], bytes]
    mode: Mode
    where: str
    height: int
    width: int

    def load(self) -> Tensor:
        """Pixels ``[C, height, width]`` float32 in [0, 1]."""
        with opened(io.BytesIO(self.content()), self.where) as image:
            return to_tensor(upright(image, self.mode, self.where))


def stored_pictures(
    rows: Mapping[int, Any] | Any, index: int, columns: Sequence[str], mode: Mode, where: str
) -> tuple[StoredPicture, ...]:
    """The pictures in some columns of a row, in their order.

    Raises:
        DataError: if one cannot be read.
    """
    found = []
    for column in columns:
        for number, item in enumerate(_items(rows[index][column])):
            place = f"{where}: {column}"

            def content(column: str = column, number: int = number, place: str = place) -> bytes:
                return _bytes(_items(rows[index][column])[number], place)

            height, width = size_of(io.BytesIO(_bytes(item, place)), mode, place)
            found.append(StoredPicture(content, mode, place, height, width))
    return tuple(found)


def _items(value: Any) -> list[Any]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if item]


def _bytes(item: dict[str, Any], where: str) -> bytes:
    """What is in a picture's file: it is in the row, or the row has its path, maybe in a zip."""
    from datasets.utils.file_utils import xopen

    if item["bytes"] is not None:
        return item["bytes"]
    try:
        inside, _, archive = item["path"].removeprefix("zip://").partition("::")
        if os.path.isfile(archive):
            return _opened_zip(archive).read(inside)
        with xopen(item["path"], "rb") as file:
            return file.read()
    except Exception as error:  # of the library, of archives, of the hub's client
        reason = " ".join(str(error).split())
        raise DataError(f"{where}: cannot be read: {reason}") from error


@lru_cache(maxsize=16)
def _opened_zip(archive: str) -> ZipFile:
    """The library would read the list of all that is in an archive for each picture of it."""
    return ZipFile(archive)
