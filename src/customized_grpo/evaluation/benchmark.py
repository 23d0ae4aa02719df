"""A model, or anyone's pictures, on a benchmark: from its config to its files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from customized_grpo.assets import path_revision
from customized_grpo.config import BenchmarkConfig, Plug
from customized_grpo.config.decoding import to_raw
from customized_grpo.data.overview import read_in_part
from customized_grpo.devices import pick_device
from customized_grpo.errors import CheckpointError, ConfigError
from customized_grpo.evaluation.items import BenchmarkSet
from customized_grpo.evaluation.manifest import Outputs, read_outputs
from customized_grpo.evaluation.metrics import Metric
from customized_grpo.evaluation.outcome import Judgement, Origin, Outcome, Yardstick
from customized_grpo.evaluation.panel import measure
from customized_grpo.evaluation.report.gallery import gallery
from customized_grpo.evaluation.sampling import generate
from customized_grpo.evaluation.sets import build_set
from customized_grpo.evaluation.store import FeatureStore
from customized_grpo.evaluation.tables import benchmark_markdown
from customized_grpo.files import write_atomic
from customized_grpo.runs.ranks import ALONE, Ranks

logger = logging.getLogger("customized_grpo")

JSON, TABLES, GALLERY = "benchmark.json", "benchmark.md", "gallery.html"


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
    baseline = None if config.baseline is None else _read_baseline(Path(config.baseline), folder)
    wanted = build_set(config.benchmark, config.num_images)
    ranks.barrier()  # all have read the baseline and the config's files
    if ranks.is_first:
        for name in (JSON, TABLES, GALLERY):  # lest they be taken for those of this one if it fails
            (folder / name).unlink(missing_ok=True)
    if config.generator is not None:
        generate(config, wanted, folder / "images", device, ranks)
    pictures = folder / "images" if config.images is None else Path(config.images)
    outputs = read_outputs(pictures, wanted, config.allow_partial)
    metrics = [Metric(c, position, device) for position, c in enumerate(config.metrics)]
    encoders = {metric.label: metric.identity for metric in metrics}
    if ranks.is_first:
        _say_what_is_read_in_part(config, wanted)
    if baseline is not None:
        _check_baseline(baseline, wanted.digest, encoders, config.allow_partial)
    store = FeatureStore(Path(config.cache or folder / "cache"), config.batch_size)
    measured = measure(metrics, wanted, outputs, store, ranks)
    if measured is None:
        return None
    outcome = _outcome(config, wanted, outputs, metrics, measured, baseline)
    write_atomic(folder / TABLES, benchmark_markdown(outcome))
    write_atomic(folder / GALLERY, gallery(outcome, wanted, outputs))
    write_atomic(folder / JSON, outcome.to_json())  # the last: it says that all is there
    return outcome


def _say_what_is_read_in_part(config: BenchmarkConfig, wanted: BenchmarkSet) -> None:
    plugs: dict[str, Plug] = {f"metrics.{metric.label}": metric for metric in config.metrics}
    if config.generator is not None:
        plugs["generator"] = config.generator
    for line in read_in_part(plugs, (item.prompt for item in wanted.items)):
        logger.warning(line)


def _outcome(
    config: BenchmarkConfig,
    wanted: BenchmarkSet,
    outputs: Outputs,
    metrics: list[Metric],
    measured: tuple[Judgement, dict[str, Judgement]],
    baseline: Outcome | None,
) -> Outcome:
    return Outcome(
        name=config.name,
        own=measured[0],
        yardstick=Yardstick(
            set=wanted.type,
            items=outputs.items,
            objectives={metric.leading: metric.objective for metric in metrics},
            anchors=measured[1],
            base=None if baseline is None else _aligned(baseline, outputs),
            base_name="" if baseline is None else f"{baseline.name} (baseline)",
        ),
        weights=None if config.lora is None else path_revision(config.lora),
        origin=Origin(
            digest=wanted.digest,
            counts=wanted.counts(),
            rules=dict(wanted.rules),
            config=to_raw(config),
            encoders={metric.label: metric.identity for metric in metrics},
            files=tuple(photo.name for photo in outputs.photos),
            digests=tuple(photo.digest for photo in outputs.photos),
            missing=tuple(item.describe() for item in outputs.missing),
            base_is_partial=baseline is not None and baseline.is_partial,
        ),
    )


def _aligned(baseline: Outcome, outputs: Outputs) -> Judgement:
    """The baseline's numbers for these pictures, so that rows are pairs."""
    rows = {item.key: row for row, item in enumerate(baseline.yardstick.items)}
    return baseline.own.take([rows.get(item.key) for item in outputs.items])


def _read_baseline(folder: Path, own: Path) -> Outcome:
    if folder.resolve() == own.resolve():
        raise ConfigError(
            f"baseline: must be another evaluation than this one, got {str(folder)!r}; choose "
            "another name"
        )
    try:
        return Outcome.read(folder / JSON)
    except CheckpointError as error:
        raise ConfigError(
            f"baseline: must be the folder of a finished evaluation, got {str(folder)!r} ({error})"
        ) from error


def _check_baseline(
    baseline: Outcome, digest: str, encoders: Mapping[str, dict], allow_partial: bool
) -> None:
    """Makes sure that the baseline's numbers can be compared with others."""
    name, origin = baseline.name, baseline.origin
    if baseline.is_partial and not allow_partial:
        raise ConfigError(
            f"baseline: must be complete, got {name!r} with pictures missing; add them, or write "
            "--allow-partial true"
        )
    if origin is None or origin.digest != digest:
        raise ConfigError(
            f"baseline: must be of the same benchmark, got {name!r} of other photos, prompts, "
            "references or num_images; evaluate it on this one"
        )
    shared = encoders.keys() & origin.encoders.keys()
    for label in shared:
        if origin.encoders[label] != encoders[label]:
            raise ConfigError(
                f"baseline: metric {label!r} must be measured by the same model, settings and "
                f"software in {name!r}; evaluate it again by this config's metrics"
            )
    if not shared:
        raise ConfigError(
            f"baseline: must have a metric of this config, got {sorted(origin.encoders)} in "
            f"{name!r}; evaluate it again by this config's metrics"
        )
