"""What an evaluation found: numbers per picture, anchors, statistics, as ``benchmark.json``.

Nothing of time, machine load or process is in it: the same pictures and models give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customized_grpo.errors import ConfigError
from customized_grpo.evaluation.anchors import COPY, ORACLE, RANDOM
from customized_grpo.evaluation.items import Item
from customized_grpo.evaluation.measures import joint_columns
from customized_grpo.evaluation.statistics import Estimate, estimates
from customized_grpo.evaluation.measures import hypervolume

JSON = "benchmark.json"
FORMAT = 1
_DIGITS = 7  # float32 has no more


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one model."""

    name: str
    type: str
    """Of the benchmark."""
    set_digest: str
    counts: dict[str, int]
    rules: dict[str, str]
    config: dict[str, Any]
    encoders: dict[str, dict[str, Any]]
    """Metric -> what its numbers depend on."""
    leading: dict[str, str]
    """Objective -> the column that joint rates and the hypervolume take."""
    items: tuple[Item, ...]
    files: tuple[str, ...]
    digests: tuple[str, ...]
    """SHA-256 of the pictures."""
    columns: dict[str, Tensor]
    anchors: dict[str, dict[str, Tensor]]
    missing: tuple[str, ...] = ()
    """Of a partial evaluation: the pictures that it lacks."""
    baseline: Baseline | None = None

    @cached_property
    def subjects(self) -> list[str]:
        """Of every picture."""
        return [item.subject for item in self.items]

    @cached_property
    def summary(self) -> dict[str, Estimate]:
        """Of every column over all pictures."""
        return estimates(self.columns | self.joint, self.subjects)

    @cached_property
    def anchor_summaries(self) -> dict[str, dict[str, Estimate]]:
        """The same of the anchors, over the same pictures' subjects and prompts."""
        names = [name for name in (ORACLE, COPY, RANDOM) if name in self.anchors]
        return {name: estimates(self.anchors[name], self.subjects) for name in names}

    @cached_property
    def paired(self) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]] | None:
        """Columns of both, own and the baseline's, for the pictures that both have."""
        if self.baseline is None:
            return None
        rows = [n for n, item in enumerate(self.items) if item.key in self.baseline.rows]
        other = [self.baseline.rows[self.items[n].key] for n in rows]
        names = [name for name in self.columns if name in self.baseline.columns]
        return (
            {name: self.columns[name][rows] for name in names},
            {name: self.baseline.columns[name][other] for name in names},
            [self.subjects[n] for n in rows],
        )

    @cached_property
    def differences(self) -> dict[str, Tensor]:
        """This less the baseline, picture by picture."""
        if self.paired is None:
            return {}
        own, other, _ = self.paired
        return {name: own[name] - other[name] for name in own}

    @cached_property
    def changes(self) -> dict[str, Estimate]:
        """Paired differences to the baseline."""
        return estimates(self.differences, self.paired[2]) if self.paired else {}

    @cached_property
    def joint(self) -> dict[str, Tensor]:
        """Joint domination and collapse against the baseline, per picture; NaN without a pair.

        {} where the baseline lacks a leading metric.
        """
        if self.paired is None or self.baseline is None:
            return {}
        names = list(self.leading.values())
        if any(name not in self.paired[0] for name in names):
            return {}
        own = {name: _as_written(self.paired[0][name]) for name in names}  # as the baseline's are
        found = joint_columns(own, {name: self.paired[1][name] for name in names})
        rows = [n for n, item in enumerate(self.items) if item.key in self.baseline.rows]
        whole = {}
        for name, values in found.items():
            whole[name] = torch.full((len(self.items),), torch.nan, dtype=torch.float64)
            whole[name][rows] = values
        return whole

    @cached_property
    def groups(self) -> dict[str, dict[str, Outcome]]:
        """``category`` and ``kind`` -> group -> its part; {} where there is one group only."""
        attributes = {
            "category": [item.category for item in self.items],
            "kind": [item.kind for item in self.items],
        }
        return {name: self._parts(groups) for name, groups in attributes.items()}

    def _parts(self, groups: Sequence[str]) -> dict[str, Outcome]:
        names = sorted(set(groups) - {""})
        rows = {name: [n for n, group in enumerate(groups) if group == name] for name in names}
        return {n: self._part(some) for n, some in rows.items()} if len(names) > 1 else {}

    def _part(self, rows: list[int]) -> Outcome:
        """Of some pictures, with anchors and baseline."""
        return replace(
            self,
            items=tuple(self.items[row] for row in rows),
            files=tuple(self.files[row] for row in rows),
            digests=tuple(self.digests[row] for row in rows),
            columns={name: column[rows] for name, column in self.columns.items()},
            anchors={
                anchor: {name: column[rows] for name, column in columns.items()}
                for anchor, columns in self.anchors.items()
            },
        )

    def hypervolume(self, summary: Mapping[str, Estimate] | None = None) -> float | None:
        """Area of (prompt, identity) above a copy's prompt score and a random subject's identity.

        None where one of the two is not measured.
        """
        summary = self.summary if summary is None else summary
        prompt, identity = self.leading.get("prompt"), self.leading.get("identity")
        anchors = self.anchor_summaries
        if (
            prompt not in summary
            or identity not in summary
            or prompt not in anchors.get(COPY, {})
            or identity not in anchors.get(RANDOM, {})
        ):
            return None
        chance = (anchors[COPY][prompt].mean, anchors[RANDOM][identity].mean)
        return hypervolume([(summary[prompt].mean, summary[identity].mean)], chance)

    def to_json(self) -> str:
        """The whole file."""
        content = {
            "format": FORMAT,
            "name": self.name,
            "complete": not self.missing,
            "missing": list(self.missing),
            "benchmark": {
                "type": self.type,
                "digest": self.set_digest,
                "counts": self.counts,
                "rules": self.rules,
            },
            "config": self.config,
            "encoders": self.encoders,
            "leading": self.leading,
            **self._statistics_json(),
            "groups": {
                name: {group: part._statistics_json() for group, part in parts.items()}
                for name, parts in self.groups.items()
            },
            "items": [self._item_json(row) for row in range(len(self.items))],
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def _statistics_json(self) -> dict[str, Any]:
        return {
            "summary": _plain(self.summary),
            "hypervolume": _rounded(self.hypervolume()),
            "anchors": _plain(self.anchor_summaries),
            "baseline": None if self.baseline is None else self._baseline_json(),
        }

    def _baseline_json(self) -> dict[str, Any]:
        assert self.baseline is not None
        assert self.paired is not None
        return {
            "name": self.baseline.name,
            "complete": self.baseline.complete,
            "summary": _plain(self.baseline_summary),
            "hypervolume": _rounded(self.hypervolume(self.baseline_summary)),
            "changes": _plain(self.changes),
        }

    @cached_property
    def baseline_summary(self) -> dict[str, Estimate]:
        """Of the baseline's pictures that have a partner here."""
        return estimates(self.paired[1], self.paired[2]) if self.paired else {}

    def _item_json(self, row: int) -> dict[str, Any]:
        item = self.items[row]
        columns = self.columns | self.joint
        return {
            "subject": item.subject,
            "prompt_index": item.prompt_index,
            "prompt": item.prompt,
            "kind": item.kind,
            "category": item.category,
            "references": list(item.references),
            "index": item.index,
            "file": self.files[row],
            "sha256": self.digests[row],
            "numbers": {name: _rounded(column[row].item()) for name, column in columns.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A finished evaluation to compare with."""

    name: str
    complete: bool
    set_digest: str
    encoders: dict[str, dict[str, Any]]
    rows: dict[tuple[Any, ...], int] = field(repr=False)
    """Key of an item -> its row in the columns."""
    columns: dict[str, Tensor] = field(repr=False)

    @classmethod
    def read(cls, folder: Path, own: Path) -> Baseline:
        """Reads ``benchmark.json`` of a folder, which is not to be the ``own`` one.

        Raises:
            ConfigError: if it is missing or is something else.
        """
        if folder.resolve() == own.resolve():
            raise ConfigError(
                f"baseline: must be another evaluation than this one, got {str(folder)!r}; choose "
                "another name"
            )
        file = folder / JSON
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
            items = content["items"]
            return cls(
                name=content["name"],
                complete=content["complete"],
                set_digest=content["benchmark"]["digest"],
                encoders=content["encoders"],
                rows={_key(item): row for row, item in enumerate(items)},
                columns=_columns([item["numbers"] for item in items]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"baseline: must be the folder of a finished evaluation, got {str(folder)!r} "
                f"({error!r}); run cgrpo evaluate on its config first"
            ) from error

    def check(
        self, set_digest: str, encoders: Mapping[str, dict[str, Any]], allow_partial: bool
    ) -> None:
        """Makes sure that its numbers can be compared with others.

        Raises:
            ConfigError: naming what differs.
        """
        if not self.complete and not allow_partial:
            raise ConfigError(
                f"baseline: must be complete, got {self.name!r} with pictures missing; add them, "
                "or write --allow-partial true"
            )
        if self.set_digest != set_digest:
            raise ConfigError(
                f"baseline: must be of the same benchmark, got {self.name!r} of other photos, "
                "prompts, references or num_images; evaluate it on this one"
            )
        for label in encoders.keys() & self.encoders.keys():
            if self.encoders[label] != encoders[label]:
                raise ConfigError(
                    f"baseline: metric {label!r} must be measured by the same model, settings and "
                    f"software in {self.name!r}; evaluate it again by this config's metrics"
                )
        if not encoders.keys() & self.encoders.keys():
            raise ConfigError(
                f"baseline: must have a metric of this config, got {sorted(self.encoders)} in "
                f"{self.name!r}; evaluate it again by this config's metrics"
            )


def _key(item: Mapping[str, Any]) -> tuple[Any, ...]:
    return (item["subject"], item["prompt_index"], tuple(item["references"]), item["index"])


def _columns(rows: Sequence[Mapping[str, float | None]]) -> dict[str, Tensor]:
    return {
        name: torch.tensor(
            [math.nan if row[name] is None else row[name] for row in rows], dtype=torch.float64
        )
        for name in (rows[0] if rows else ())
        if not name.startswith("joint/")
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return _plain(value.to_json())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return _rounded(value) if isinstance(value, float) else value


def _as_written(column: Tensor) -> Tensor:
    """The numbers that the file holds."""
    values = [_rounded(value) for value in column.tolist()]
    return torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, _DIGITS)
