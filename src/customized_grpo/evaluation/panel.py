"""What every metric of a benchmark computes of pictures and photos, and the columns it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from customized_grpo.config.names import COPY
from customized_grpo.errors import RewardError
from customized_grpo.evaluation.anchors import identity_anchors
from customized_grpo.evaluation.items import BenchmarkSet
from customized_grpo.evaluation.manifest import Outputs
from customized_grpo.evaluation.measures import diversity_column, identity_columns, other_prompts
from customized_grpo.evaluation.metrics import PROMPT, Metric, Query
from customized_grpo.evaluation.outcome import Judgement
from customized_grpo.evaluation.store import FeatureStore, Measurement
from customized_grpo.runs.ranks import Ranks

_DEAF = 0.5  # share of pictures whose score is the same under another prompt: a metric that is deaf

Columns = dict[str, Tensor]


def measure(
    metrics: Sequence[Metric],
    wanted: BenchmarkSet,
    outputs: Outputs,
    store: FeatureStore,
    ranks: Ranks,
) -> tuple[Judgement, dict[str, Judgement]] | None:
    """The pictures' numbers and those of the anchors; None in all processes but the first.

    Every process computes its share of what is missing in the store; the first one reads it all.

    Raises:
        DataError: if a picture cannot be read.
        RewardError: if a picture cannot be scored, or a metric of the prompt does not read it.
    """
    panel = [(_Identity if m.is_encoder else _Score)(m, wanted, outputs) for m in metrics]
    for stage in zip(*(part.stages for part in panel), strict=True):
        store.fill([measurement for some in stage for measurement in some], ranks)
    ranks.barrier()
    if not ranks.is_first:
        return None
    columns: Columns = {}
    anchors: dict[str, Columns] = {}
    for part in panel:
        columns |= part.columns(store)
        for name, some in part.anchors(store).items():
            anchors[name] = anchors.get(name, {}) | some
    return Judgement.of(columns), {name: Judgement.of(some) for name, some in anchors.items()}


class _Identity:
    """Features of pictures and photos, compared."""

    def __init__(self, metric: Metric, wanted: BenchmarkSet, outputs: Outputs) -> None:
        self._metric, self._wanted, self._items = metric, wanted, outputs.items
        photos = [
            Query(photo=photo, words=subject.words)
            for subject in wanted.subjects.values()
            for photo in subject.photos
        ]
        pictures = [
            Query(photo=photo, words=wanted.subjects[item.subject].words)
            for item, photo in zip(outputs.items, outputs.photos, strict=True)
        ]
        self._photos = _measurement(metric, "photos", photos)
        self._outputs = _measurement(metric, "outputs", pictures)
        self.stages = [self._photos], [self._outputs], []

    def columns(self, store: FeatureStore) -> Columns:
        features, photos = (store.read(m).double() for m in (self._outputs, self._photos))
        columns = identity_columns(
            features @ photos.T,
            [self._wanted.reference_rows(item) for item in self._items],
            [self._wanted.subject_rows(item.subject) for item in self._items],
            self._metric.pools,
        )
        groups = [item.key[:-1] for item in self._items]
        if len(set(groups)) < len(groups):
            columns["diversity"] = diversity_column(features, groups)
        return self._named(columns)

    def anchors(self, store: FeatureStore) -> dict[str, Columns]:
        photos = store.read(self._photos)
        found = identity_anchors(photos, self._wanted, self._items, self._metric.pools)
        return {name: self._named(columns) for name, columns in found.items()}

    def _named(self, columns: Columns) -> Columns:
        return {f"{self._metric.label}/{name}": column for name, column in columns.items()}


class _Score:
    """Scores of pictures, under another prompt too if the metric is about prompts."""

    def __init__(self, metric: Metric, wanted: BenchmarkSet, outputs: Outputs) -> None:
        self._metric = metric
        own = [
            Query.of(item, photo, wanted)
            for item, photo in zip(outputs.items, outputs.photos, strict=True)
        ]
        self._scores = [_measurement(metric, "scores", own)]
        if metric.objective == PROMPT:
            asked = [(item.subject, item.prompt) for item in wanted.items]  # missing ones too
            others = dict(zip(asked, other_prompts(asked), strict=True))
            prompts = [others[item.subject, item.prompt] for item in outputs.items]
            other = [replace(q, prompt=p) for q, p in zip(own, prompts, strict=True)]
            self._scores.append(_measurement(metric, "scores", other))
        self._asked = [item.key[:-1] for item in outputs.items]  # whatever the index
        asked_once = dict(zip(self._asked, outputs.items, strict=True)).values()
        copies = [Query.of(item, wanted.references(item)[0], wanted) for item in asked_once]
        self._copies = _measurement(metric, "scores", copies)
        self.stages = [], self._scores, [self._copies]

    def columns(self, store: FeatureStore) -> Columns:
        own, *other = (store.read(m).double() for m in self._scores)
        columns = {self._metric.label: own}
        if other:
            columns[f"{self._metric.label}/specific"] = self._specific(own, other[0])
        return columns

    def anchors(self, store: FeatureStore) -> dict[str, Columns]:
        places = {key: place for place, key in enumerate(dict.fromkeys(self._asked))}
        copies = store.read(self._copies).double()
        return {COPY: {self._metric.label: copies[[places[key] for key in self._asked]]}}

    def _specific(self, own: Tensor, other: Tensor) -> Tensor:
        """Score by the own prompt less that by another one."""
        pairs = zip(*(measurement.queries for measurement in self._scores), strict=True)
        differs = torch.tensor([a.prompt != b.prompt for a, b in pairs])
        same = (own == other)[differs].double()
        if len(same) and same.mean() > _DEAF:
            raise RewardError(
                f"{self._metric.label}: must depend on the whole prompt, got the same score under "
                f"another prompt for {int(same.sum())} of {len(same)} pictures; its text input is "
                "cut off or not used: mend the model, or give it another objective"
            )
        return torch.where(differs, own - other, torch.nan)


def _measurement(metric: Metric, what: str, queries: list[Query]) -> Measurement:
    return Measurement(compute=getattr(metric, what), digest=metric.digest(what), queries=queries)
