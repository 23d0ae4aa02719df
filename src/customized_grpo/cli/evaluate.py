"""`cgrpo evaluate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from customized_grpo.cli.fields import FieldsHelp
from customized_grpo.cli.shared import alone, export_words, hide_loading_bars, next_step, refuse
from customized_grpo.errors import ConfigError

if TYPE_CHECKING:
    from customized_grpo.config import BenchmarkConfig


def add(commands: Any) -> None:
    """Adds the parser."""
    parser = commands.add_parser(
        "evaluate",
        add_help=False,
        help="compare base and tuned of a run, or any model on a benchmark",
        description="Compare base and tuned of a run on held-out subjects, by its evaluators; or "
        "evaluate a model, or anyone's pictures, on a benchmark (YAML file; any of its fields can "
        "be overridden, --section.field value).",
        epilog="examples:\n  cgrpo evaluate runs/emoji\n"
        "  cgrpo evaluate runs/emoji --split validation   to choose between recipes\n"
        "  cgrpo evaluate configs/benchmarks/emoji.yaml --name mine --lora runs/mine/weights\n"
        "  cgrpo evaluate configs/benchmarks/dreambench.yaml --name other --images pictures "
        "--generator null --sampling '{}'\n"
        "  torchrun --nproc_per_node 8 -m customized_grpo evaluate "
        "configs/benchmarks/dreambench.yaml\n"
        "metrics, rules and the form of the manifest: docs/evaluation.md",
    )
    parser.add_argument("-h", "--help", action=FieldsHelp, config_of=_fields_of)
    target = "folder of a run, or YAML file of a benchmark"
    parser.add_argument("target", metavar="TARGET", type=Path, help=target)
    parser.add_argument(
        "--split",
        choices=("held_out", "validation"),
        help="of a run: validation examples are for tuning a recipe (default: held_out)",
    )
    parser.add_argument(
        "--num-examples",
        type=int,
        metavar="N",
        help="of a run: the standard error falls with their root (default: the run's)",
    )
    write = "of a benchmark: write the manifest of the folder `images`, to be filled, and end"
    parser.add_argument("--write-manifest", action="store_true", help=write)
    photos = "of a benchmark: say how well its identity metrics tell its subjects apart, by the "
    photos += "photos alone, and end"
    parser.add_argument("--photos", action="store_true", help=photos)
    parser.add_argument("--json", action="store_true", help="print JSON, no tables")
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    if _is_benchmark(options.target):
        _evaluate_benchmark(options, overrides)
        return
    refuse(options, ("write_manifest", "photos"), "on a run; give a benchmark's YAML file")
    if overrides:
        raise ConfigError(
            f"{overrides[0]} has no effect on a run, which is evaluated as its config says; see "
            "`cgrpo evaluate --help`"
        )
    alone("`cgrpo evaluate RUN`")
    split = options.split or "held_out"
    judge(options.target, split, options.num_examples, as_json=options.json)


def _is_benchmark(target: Path) -> bool:
    return target.suffix in (".yaml", ".yml")


def _fields_of(target: Path | None) -> BenchmarkConfig | None:
    if target is None or not _is_benchmark(target):
        return None
    from customized_grpo.config import load_benchmark

    return load_benchmark(target)


def _evaluate_benchmark(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from customized_grpo.config import load_benchmark

    refuse(options, ("split", "num_examples"), "on a benchmark; leave it out")
    config = load_benchmark(options.target, overrides)
    if options.write_manifest:
        _write_manifest(config)
        return
    if options.photos:
        _measure_photos(config, options.json)
        return

    from customized_grpo.evaluation.benchmark import GALLERY, evaluate_benchmark
    from customized_grpo.evaluation.tables import benchmark_markdown, verdict
    from customized_grpo.runs.ranks import connected

    hide_loading_bars()
    with connected(config.device) as ranks:
        outcome = evaluate_benchmark(config, ranks)
    if outcome is None:  # the first process prints
        return
    if options.json:
        print(outcome.to_json(), end="")
        return
    print(benchmark_markdown(outcome))
    print(f"gallery: {Path(config.output_dir) / config.name / GALLERY}")
    if sentence := verdict(outcome):
        print(sentence)


def _write_manifest(config: BenchmarkConfig) -> None:
    from customized_grpo.evaluation.manifest import write_wanted
    from customized_grpo.evaluation.sets import build_set

    alone("--write-manifest")
    if config.images is None:
        raise ConfigError("--write-manifest needs images, the folder it is for, got null; name it")
    wanted = build_set(config.benchmark, config.num_images)
    file, count = write_wanted(Path(config.images), wanted)
    print(f"manifest: {file} ({count} of {len(wanted.items)} pictures are there)")


def _measure_photos(config: BenchmarkConfig, as_json: bool) -> None:
    from customized_grpo.evaluation.photos import measure_photos, photo_table

    alone("--photos")
    hide_loading_bars()
    numbers = measure_photos(config)
    print(json.dumps(numbers) if as_json else photo_table(numbers))


def judge(
    run: Path,
    split: Literal["held_out", "validation"] = "held_out",
    num_examples: int | None = None,
    *,
    as_json: bool = False,
) -> None:
    """Base against tuned of a run."""
    from customized_grpo.evaluation.evaluate import Place, evaluate_run
    from customized_grpo.evaluation.tables import makes_a_difference, run_table, verdict
    from customized_grpo.runs.run import Run

    hide_loading_bars()
    outcome = evaluate_run(run, split, num_examples)
    if as_json:
        print(outcome.to_json(), end="")
        return
    print(f"picture: {Place(run, split).grid}")
    print(f"{run_table(outcome)}; rows: docs/evaluation.md")
    print(sentence := verdict(outcome))
    if not sentence or makes_a_difference(outcome):
        next_step(*export_words(run))
    else:
        longer = 2 * Run.open(run).config.train.num_updates
        next_step("resume", run, "--train.num_updates", longer)
