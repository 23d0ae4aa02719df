"""SynCD (arXiv:2502.01720): sets of pictures of one subject, by its JSON metadata.

Two forms are read. The dataset's own (github.com/nupurkmr9/syncd, method/data/data.py): sets with
``filenames`` and ``prompts``, masks in a folder ``masks`` beside the pictures. And the pairs that
github.com/Safeoffellow/Customized-GRPO trained on (datasets/train_1w_syncd_embedding.json):
``ref_img`` and ``text``, and beside the picture NAME.png its subject alone, NAME_seg.png, if there
is one. Neither was tried on the published pictures, which need a download.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from customized_grpo.config import DataConfig
from customized_grpo.config.limits import Count, FilePath
from customized_grpo.data.jsonl import count_pictures
from customized_grpo.data.listed import ListedSource
from customized_grpo.data.rows import Row, read_rows
from customized_grpo.data.splits import split_by_subject
from customized_grpo.data.texts import (
    check_list,
    check_text,
    inside,
    parse_json,
    short,
)
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.files import Names, alike_name, read_text

Share = Annotated[float, Field(gt=0, lt=1)]
_DUPLICATE = 0.98  # the dataset's own code leaves out pictures that are more alike than this


@dataclass(frozen=True, kw_only=True, slots=True)
class SynCDConfig(DataConfig):
    """SynCD's metadata: sets of pictures, or the pairs of Customized-GRPO."""

    type: Literal["syncd"] = "syncd"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: FilePath
    """A metadata file, or a folder with `*metadata.json` or `*metadata_with_scores.json`."""
    root: FilePath | None = None
    """Folder that the pictures' paths start from; null = the folder of the metadata."""
    num_references: Count = 1
    """References per example, other pictures of the set; pairs have one."""
    min_dino: float | None = None
    """Least similarity to another picture of the set (`dino_scores`); null = no filter."""
    min_aesthetics: float | None = None
    """Least aesthetic score of a picture (`aesthetics_scores`); null = no filter."""
    held_out: Share = 0.05
    """Share of the subjects to evaluate on; as many more are for validation."""

    def build(self, seed: int) -> ListedSource:
        """Reads the metadata and checks every picture in use."""
        names, left = Names(), Counter[str]()
        found = [
            pair
            for file in self._metadata()
            for number, item in enumerate(_read(file))
            for pair in self._rows(file, number, item, names, left)
        ]
        if not found:
            raise DataError(f"{self.path}: no example is left; lower min_dino or min_aesthetics")
        entries = read_rows([row for _, row in found], self.path)
        splits = split_by_subject(entries, [subject for subject, _ in found], self.held_out)
        if not splits.training:
            raise DataError(f"{self.path}: must show at least two subjects, got one")
        remarks = [f"{self.path}: {count_pictures(entries)}"]
        remarks += [f"{count} {why}" for why, count in left.items()]
        how = "use data of more subjects: it gets a share of them"
        return ListedSource(splits, seed, how, remarks)

    def _metadata(self) -> list[Path]:
        path = Path(self.path)
        if path.is_file():
            return [path]
        scored = self.min_dino is not None or self.min_aesthetics is not None
        end = "metadata_with_scores.json" if scored else "metadata.json"
        files = [file for file in sorted(path.glob("*")) if alike_name(file.name).endswith(end)]
        if not files:
            raise ConfigError(f"path: must be a JSON file or a folder with *{end}, got {path}")
        return files

    def _rows(
        self, file: Path, number: int, item: Any, names: Names, left: Counter[str]
    ) -> Iterator[tuple[str, Row]]:
        """Rows, each with what tells its subject from others; what is not used is counted."""
        where, root = f"{file}: item {number}", Path(self.root) if self.root else file.parent
        if not isinstance(item, dict) or not ("filenames" in item or "ref_img" in item):
            raise DataError(
                f"{where}: must be an object with filenames or ref_img, got {short(item)}"
            )
        if "ref_img" in item:
            yield self._pair(where, root, item, names)
        else:
            yield from self._set(where, root, item, names, left)

    def _pair(self, where: str, root: Path, item: dict[str, Any], names: Names) -> tuple[str, Row]:
        if self.num_references > 1 or self.min_dino or self.min_aesthetics:
            raise ConfigError(
                "num_references, min_dino, min_aesthetics: must be left out for pairs, which have "
                f"one reference and no scores; got pairs in {where}"
            )
        reference = inside(f"{where}: ref_img", root, check_text(where, item, "ref_img"), names)
        key = "category_description"
        words = check_text(where, item, key).removesuffix(".") if item.get(key) else ""
        text = check_text(where, item, "text")
        subject = names.find(reference.with_stem(f"{reference.stem}_seg"))
        row = Row(
            where=where,
            id=where,
            prompt=text,
            subject=words,
            references=(reference,),
            cut_outs=(subject,) if subject else (),
        )
        return str(reference.parent), row

    def _set(
        self, where: str, root: Path, item: dict[str, Any], names: Names, left: Counter[str]
    ) -> Iterator[tuple[str, Row]]:
        given = check_list(where, item, "filenames", "path")
        files = [inside(f"{where}: filenames", root, name, names) for name in given]
        prompts = check_list(where, item, "prompts", "text")
        if len(prompts) < len(given):
            raise DataError(f"{where}: prompts: must be one per file, got {len(prompts)}")
        kept = self._kept(where, item, given)
        if filtered := len(given) - len(kept):
            left["pictures not used: below min_dino or min_aesthetics, or as a twin"] += filtered
        subject = str(item.get("objaverse_id") or where)
        for number, index in enumerate(kept):
            others = [files[i] for i in (*kept[number + 1 :], *kept[:number])]
            if len(others) < self.num_references:
                left["pictures not used: their sets have fewer than num_references others"] += 1
                continue
            references = tuple(others[: self.num_references])
            found = (names.find(p.parent / "masks" / f"{p.stem}.jpg") for p in references)
            masks = tuple(mask for mask in found if mask)
            if 0 < len(masks) < len(references):
                left["examples without masks: some of their references have none"] += 1
            place = f"{where}: picture {index}"
            yield (
                subject,
                Row(
                    where=place,
                    id=place,
                    prompt=prompts[index].strip(),
                    references=references,
                    masks=masks if len(masks) == len(references) else (),
                ),
            )

    def _kept(self, where: str, item: dict[str, Any], names: list[str]) -> list[int]:
        """Pictures of a set that pass the filters, as in the dataset's own code."""
        kept = set(range(len(names)))
        try:
            if self.min_aesthetics is not None:
                scores = item["aesthetics_scores"]
                kept &= {i for i in kept if scores[Path(names[i]).stem] >= self.min_aesthetics}
            if self.min_dino is not None:
                pairs = [
                    (i, j)
                    for i, row in enumerate(item["dino_scores"])
                    for j, score in enumerate(row)
                    if self.min_dino <= score <= _DUPLICATE and i < j
                ]
                kept &= {i for pair in pairs for i in pair}
        except (KeyError, TypeError) as error:
            raise DataError(f"{where}: must have scores of every picture: {error!r}") from error
        return sorted(kept)


def _read(file: Path) -> list[Any]:
    items = parse_json(str(file), read_text(file))
    if not isinstance(items, list):
        raise DataError(f"{file}: must be a list, got {type(items).__name__}")
    return items
