"""Any dataset of the Hugging Face hub with columns of captions and pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from customized_grpo.config import DataConfig, Host
from customized_grpo.config.limits import FilePath
from customized_grpo.data.hub import as_texts, load_rows, stored_pictures
from customized_grpo.data.jsonl import count_pictures
from customized_grpo.data.listed import Entry, ListedSource
from customized_grpo.data.rows import named_subjects
from customized_grpo.data.splits import split_by_subject
from customized_grpo.data.streamed import StreamedSource
from customized_grpo.data.syncd import Share
from customized_grpo.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class HfConfig(DataConfig):
    """Rows of references and captions: each line of a caption is a prompt.

    A caption must ask for something new: one that describes the reference rewards copying it.
    """

    type: Literal["hf"] = "hf"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: FilePath
    """Hub id, or a folder with parquet files, or pictures and their metadata."""
    subset: str | None = None
    """Of a dataset that has several."""
    split: str = "train"
    """Of the dataset; what is held out is taken from it."""
    references: tuple[str, ...] = ("image",)
    """Columns of the reference pictures: of one or a list of them."""
    masks: tuple[str, ...] = ()
    """Columns of their masks, white where the subject is, in the same order; none = no masks."""
    caption: str = "caption"
    """Column of the captions: a text whose lines are prompts, or a list of such texts."""
    heading: bool = False
    """Whether a caption of several lines begins with a heading, which is no prompt."""
    subject: str | None = None
    """Column of words for the subject; rows of the same are held out together. null = not known."""
    reference_subjects: tuple[str, ...] = ()
    """Columns of words for the subject of each reference, of one or a list of them, in the same
    order; none = all references of a row show one subject."""
    held_out: Share = 0.05
    """Share of the subjects, or of the rows, to evaluate on; as many more are for validation."""
    streaming: bool = False
    """Whether rows are read when their turn comes, in order, and not downloaded before."""

    def hosts(self) -> tuple[Host, ...]:
        """See Plug: the hub, unless the dataset lies in a folder."""
        return () if Path(self.path).is_dir() else (Host(url="https://huggingface.co"),)

    def build(self, seed: int) -> ListedSource | StreamedSource:
        """Opens the dataset, and checks all its pictures unless it is streamed."""
        rows = load_rows(
            self.path,
            [self.caption, *([self.subject] if self.subject else []), *self.reference_subjects],
            [*self.references, *self.masks],
            who="type: hf",
            subset=self.subset,
            split=self.split,
            streaming=self.streaming,
        )
        for column in dict.fromkeys([self.caption, *self.reference_subjects]):
            rows = as_texts(rows, self.path, column)
        if self.subject:
            rows = as_texts(rows, self.path, self.subject, lists=False)
        if self.streaming:
            return StreamedSource(rows, self.entries, self.subject_of, self.held_out, seed)
        found, left = self._read(rows)
        entries = [entry for some in found.values() for entry in some]
        if not entries:
            raise DataError(f"{self.path}: must have a row with a caption and a picture, got none")
        subjects = [self.subject_of(rows[i], i) for i, some in found.items() for _ in some]
        splits = split_by_subject(entries, subjects, self.held_out)
        if not splits.training:
            raise DataError(f"{self.path}: must have two rows or subjects at least, got one")
        remarks = [f"{self.path}: {len(found)} rows, {count_pictures(entries)}"]
        remarks += [f"{count} rows not used: {why}" for why, count in left.items()]
        return ListedSource(splits, seed, "use more data: it gets a share of the rows", remarks)

    def _read(self, rows: Any) -> tuple[dict[int, Sequence[Entry]], Counter[str]]:
        """Entries by row, and how many rows have none for what reason."""
        with ThreadPoolExecutor() as pool:
            read = list(pool.map(partial(self.entries, rows), range(len(rows))))
        found = {i: some for i, some in enumerate(read) if not isinstance(some, str)}
        return found, Counter(why for why in read if isinstance(why, str))

    def subject_of(self, row: Mapping[str, Any], index: int) -> str:
        """What tells a row's subject from others."""
        return str(row[self.subject] or index) if self.subject else str(index)

    def entries(self, rows: Any, index: int) -> Sequence[Entry] | str:
        """The entries of a row, one for each prompt, or why there are none.

        Raises:
            DataError: if a picture of it cannot be read, or masks do not fit.
        """
        where, row = f"{self.path}: row {index}", rows[index]
        if not (prompts := self._prompts(row[self.caption])):
            return f"no text in the column {self.caption}"
        references = stored_pictures(rows, index, self.references, "RGB", where)
        if not references:
            return f"no picture in the columns {', '.join(self.references)}"
        masks = stored_pictures(rows, index, self.masks, "L", where)
        sizes = [[(p.height, p.width) for p in some] for some in (references, masks)]
        if self.masks and sizes[0] != sizes[1]:
            raise DataError(
                f"{where}: {', '.join(self.masks)}: must match the references in number and size, "
                f"got {sizes[1]} for {sizes[0]} (height, width); leave masks out or redraw them"
            )
        each = [words for name in self.reference_subjects for words in _texts(row[name]) if words]
        subject = (row[self.subject] or "").strip() if self.subject else ""
        subject, subjects = named_subjects(where, subject, each, references)
        return [
            Entry(
                id=f"{self.path}/{index}/{number}",
                prompt=prompt,
                subject=subject,
                reference_subjects=subjects,
                references=references,
                masks=masks or None,
            )
            for number, prompt in enumerate(prompts)
        ]

    def _prompts(self, caption: str | Sequence[str] | None) -> list[str]:
        prompts = []
        for text in _texts(caption):
            lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
            prompts += lines[1:] if self.heading and len(lines) > 1 else lines
        return list(dict.fromkeys(prompts))


def _texts(value: str | Sequence[str] | None) -> Sequence[str]:
    return [value] if isinstance(value, str) else value or ()
