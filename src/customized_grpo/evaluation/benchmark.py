"""One evaluation, from its config to its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customized_grpo.config import BenchmarkConfig
from customized_grpo.config.decoding import to_raw
from customized_grpo.errors import RewardError
from customized_grpo.evaluation.anchors import COPY, identity_anchors
from customized_grpo.evaluation.metrics import PROMPT, Metric, Request, output_request
from customized_grpo.evaluation.store import FeatureStore, Task
from customized_grpo.evaluation.report.gallery import gallery
from customized_grpo.evaluation.sampling import generate
from customized_grpo.evaluation.items import BenchmarkSet
from customized_grpo.evaluation.manifest import Outputs, read_outputs
from customized_grpo.evaluation.measures import (
    diversity_column,
    identity_columns,
    other_prompts,
)
from customized_grpo.evaluation.outcome import JSON, Baseline, Outcome
from customized_grpo.evaluation.sets import build_set
from customized_grpo.evaluation.tables import markdown
from customized_grpo.files import write_atomic
from customized_grpo.runs.ranks import ALONE, Ranks
from customized_grpo.training.rollout import pick_device

TABLES, GALLERY = "benchmark.md", "gallery.html"
_DEAF = 0.5  # share of pictures whose score is the same under another prompt: a metric that is deaf


def evaluate_benchmark(config: BenchmarkConfig, ranks: Ranks = ALONE) -> Outcome | None:
    """Evaluates; writes ``benchmark.json``, ``benchmark.md`` and ``gallery.html``.

    Every process computes its share; the first one returns what was found, the others None.

    Raises:
        ConfigError: if a field does not fit what is there.
        DataError: naming pictures that are missing, surplus or unreadable.
        RewardError: if a picture cannot be scored.
    """
    device = pick_device(config.device)
    folder = Path(config.output_dir) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    baseline = None if config.baseline is None else Baseline.read(Path(config.baseline), folder)
    wanted = build_set(config.benchmark, config.num_images)
    ranks.wait()  # all have read the baseline and the config's files
    if ranks.first:
        _forget(folder)
    if config.generator is not None:
        generate(config, wanted, folder / "images", device, ranks)
    pictures = folder / "images" if config.images is None else Path(config.images)
    outputs = read_outputs(pictures, wanted, config.allow_partial)
    metrics = [Metric(c, position, device) for position, c in enumerate(config.metrics)]
    encoders = {metric.label: metric.identity for metric in metrics}
    if baseline is not None:
        baseline.check(wanted.digest, encoders, config.allow_partial)
    store = FeatureStore(Path(config.cache or folder / "cache"), config.batch_size)
    work = [_Work.of(metric, wanted, outputs) for metric in metrics]
    for name in ("photos", "outputs", "copies"):  # each about the same pictures
        store.fill([task for w in work for task in getattr(w, name)], ranks)
    ranks.wait()
    if not ranks.first:
        return None
    columns: dict[str, Tensor] = {}
    anchors: dict[str, dict[str, Tensor]] = {}
    for w in work:
        w.read(store, wanted, outputs, columns, anchors)
    outcome = _outcome(config, wanted, outputs, metrics, columns, anchors, baseline)
    write_atomic(folder / TABLES, markdown(outcome))
    write_atomic(folder / GALLERY, gallery(outcome, wanted, outputs))
    write_atomic(folder / JSON, outcome.to_json())  # the last: it says that all is there
    return outcome


def _forget(folder: Path) -> None:
    """Results of an earlier evaluation are not to be taken for those of one that has failed.

    What they were made of is kept, so that they come back as soon as nothing is missing.
    """
    for name in (JSON, TABLES, GALLERY):
        (folder / name).unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What one metric computes."""

    metric: Metric
    photos: list[Task]
    outputs: list[Task]
    copies: list[Task]

    @classmethod
    def of(cls, metric: Metric, wanted: BenchmarkSet, outputs: Outputs) -> _Work:
        pairs = zip(outputs.items, outputs.photos, strict=True)
        requests = [output_request(item, photo, wanted) for item, photo in pairs]
        if metric.is_encoder:
            photos = [
                Request(photo=photo, words=subject.words)
                for subject in wanted.subjects.values()
                for photo in subject.photos
            ]
            own = [Request(photo=r.photo, words=r.words) for r in requests]
            return cls(
                metric=metric,
                photos=[_task(metric, "photos", photos)],
                outputs=[_task(metric, "outputs", own)],
                copies=[],
            )
        copied = {item.key[:-1]: item for item in outputs.items}  # whatever the index
        copies = [output_request(i, wanted.references(i)[0], wanted) for i in copied.values()]
        scored = [requests]
        if metric.objective == PROMPT:
            asked = [(item.subject, item.prompt) for item in wanted.items]  # missing ones too
            others = dict(zip(asked, other_prompts(asked), strict=True))
            other = [others[item.subject, item.prompt] for item in outputs.items]
            scored.append(
                [
                    Request(photo=r.photo, words=r.words, prompt=p, references=r.references)
                    for r, p in zip(requests, other, strict=True)
                ]
            )
        return cls(
            metric=metric,
            photos=[],
            outputs=[_task(metric, "scores", some) for some in scored],
            copies=[_task(metric, "scores", copies)],
        )

    def read(
        self,
        store: FeatureStore,
        wanted: BenchmarkSet,
        outputs: Outputs,
        columns: dict[str, Tensor],
        anchors: dict[str, dict[str, Tensor]],
    ) -> None:
        """Adds the metric's columns, of the pictures and of the anchors."""
        label = self.metric.label
        if self.metric.is_encoder:
            own, known = self._identity(store, wanted, outputs)
            columns |= {f"{label}/{name}": column for name, column in own.items()}
            for anchor, some in known.items():
                named = {f"{label}/{name}": column for name, column in some.items()}
                anchors[anchor] = anchors.get(anchor, {}) | named
            return
        found = [store.read(task).double() for task in self.outputs]
        columns[label] = found[0]
        if self.metric.objective == PROMPT:
            columns[f"{label}/specific"] = self._specific(*found)
        keys = [item.key[:-1] for item in outputs.items]
        places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        copies = store.read(self.copies[0]).double()[[places[key] for key in keys]]
        anchors[COPY] = anchors.get(COPY, {}) | {label: copies}

    def _identity(
        self, store: FeatureStore, wanted: BenchmarkSet, outputs: Outputs
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Columns of the pictures, and of every anchor."""
        pool, items = self.metric.pools, outputs.items
        features, photos = (store.read(t).double() for t in (*self.outputs, *self.photos))
        own = identity_columns(
            features @ photos.T,
            [wanted.reference_rows(item) for item in items],
            [wanted.subject_rows(item.subject) for item in items],
            pool,
        )
        groups = [item.key[:-1] for item in items]
        if len(set(groups)) < len(groups):
            own["diversity"] = diversity_column(features, groups)
        return own, identity_anchors(photos, wanted, items, pool)

    def _specific(self, own: Tensor, other: Tensor) -> Tensor:
        """Score by the own prompt less that by another one.

        Raises:
            RewardError: if most scores do not depend on the prompt at all.
        """
        asked = [
            a.prompt != b.prompt
            for a, b in zip(self.outputs[0].requests, self.outputs[1].requests, strict=True)
        ]
        differs = torch.tensor(asked)
        same = (own == other)[differs].double()
        if len(same) and same.mean() > _DEAF:
            raise RewardError(
                f"{self.metric.label}: must depend on the whole prompt, got the same score under "
                f"another prompt for {int(same.sum())} of {len(same)} pictures; its text input is "
                "cut off or not used: mend the model, or give it another objective"
            )
        return torch.where(differs, own - other, torch.nan)


def _task(metric: Metric, what: str, requests: list[Request]) -> Task:
    return Task(compute=getattr(metric, what), digest=metric.digest(what), requests=requests)


def _outcome(
    config: BenchmarkConfig,
    wanted: BenchmarkSet,
    outputs: Outputs,
    metrics: list[Metric],
    columns: dict[str, Tensor],
    anchors: dict[str, dict[str, Tensor]],
    baseline: Baseline | None,
) -> Outcome:
    leading: dict[str, str] = {}
    for metric in metrics:
        column = f"{metric.label}/photos" if metric.is_encoder else metric.label
        leading.setdefault(metric.objective, column)
    raw: dict[str, Any] = to_raw(config)
    return Outcome(
        name=config.name,
        type=wanted.type,
        set_digest=wanted.digest,
        counts=wanted.counts(),
        rules=dict(wanted.rules),
        config=raw,
        encoders={metric.label: metric.identity for metric in metrics},
        leading=leading,
        items=outputs.items,
        files=tuple(photo.name for photo in outputs.photos),
        digests=tuple(photo.digest for photo in outputs.photos),
        columns=columns,
        anchors=anchors,
        missing=tuple(item.describe() for item in outputs.missing),
        baseline=baseline,
    )
