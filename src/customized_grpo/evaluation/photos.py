"""What the identity metrics of a benchmark make of its photos, before there is any picture."""

from __future__ import annotations

from pathlib import Path

from customized_grpo.config import BenchmarkConfig
from customized_grpo.devices import pick_device
from customized_grpo.errors import ConfigError
from customized_grpo.evaluation.measures import photo_numbers
from customized_grpo.evaluation.metrics import Metric, Query
from customized_grpo.evaluation.sets import build_set
from customized_grpo.evaluation.store import FeatureStore, Measurement
from customized_grpo.evaluation.tables import Table
from customized_grpo.runs.ranks import ALONE


def measure_photos(config: BenchmarkConfig) -> dict[str, dict[str, float]]:
    """Identity metric -> ``photo_numbers`` of all photos of a benchmark, in the metric's region.

    Raises:
        ConfigError: if a field does not fit what is there, or no metric is an image encoder.
        DataError: if a photo cannot be read.
        RewardError: if one cannot be scored.
    """
    device = pick_device(config.device)
    wanted = build_set(config.benchmark, config.num_images)
    store = FeatureStore(
        Path(config.cache or Path(config.output_dir, config.name, "cache")), config.batch_size
    )
    shown = [(s, photo) for s in wanted.subjects.values() for photo in s.photos]
    queries = [Query(photo=photo, words=subject.words) for subject, photo in shown]
    numbers = {}
    for position, plug in enumerate(config.metrics):
        if plug.objective != "identity":
            continue
        metric = Metric(plug, position, device)
        if metric.is_encoder:
            photos = Measurement(
                compute=metric.photos, digest=metric.digest("photos"), queries=queries
            )
            store.fill([photos], ALONE)
            numbers[metric.label] = photo_numbers(
                store.read(photos), [s.name for s, _ in shown], [s.words for s, _ in shown]
            )
    if not numbers:
        raise ConfigError(
            "metrics must have an image encoder of identity for --photos, got none; add for "
            "example {type: efficientnet-lite, objective: identity}"
        )
    return numbers


def photo_table(numbers: dict[str, dict[str, float]]) -> str:
    """Markdown: a row per metric; what the photos do not say is left empty."""
    names = list(dict.fromkeys(name for some in numbers.values() for name in some))
    rows = [
        [label, *(f"{some[name]:.2f}" if name in some else "" for name in names)]
        for label, some in numbers.items()
    ]
    return Table(heads=["", *names], rows=rows).markdown()
