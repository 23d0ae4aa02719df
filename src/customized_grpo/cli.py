"""The command `cgrpo`. Heavy modules are imported by the subcommand that needs them."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from customized_grpo.commands import completion, doctor, export, generate, init
from customized_grpo.commands.shared import (
    after_training,
    export_words,
    hide_loading_bars,
    next_step,
    positive,
)
from customized_grpo.errors import ConfigError, CustomizedGRPOError, Interrupted

if TYPE_CHECKING:
    from customized_grpo.config import RunConfig

_ABOUT = """\
Customized-GRPO: reinforcement learning for subject-driven image generation.
Teaches a generator to keep the subject of a reference picture and to do what the prompt says.
"""

_EXAMPLES = """\
examples:
  cgrpo demo                                              teach the embedded generator on a CPU
  cgrpo init my-dog --photos photos --class dog           your own photos: prompts and a config
  cgrpo train configs/emoji.yaml --train.num_updates 100  train; any field can be overridden
  cgrpo data configs/emoji.yaml                           what will be trained on, as a picture
  cgrpo train --help                                      all fields, with their defaults
  cgrpo resume runs/emoji                                 go on with a run that was stopped
  cgrpo evaluate runs/emoji                               base against tuned, held-out subjects
  cgrpo evaluate configs/benchmarks/dreambench.yaml       any model's pictures, on DreamBench
  cgrpo generate runs/emoji --file prompts.jsonl          your own prompts, base beside tuned
  cgrpo export runs/emoji --to hub-folder --out my-lora   a LoRA with its model card
  cgrpo report runs/emoji                                 curves, tables and pictures in one page
  cgrpo compare configs/studies/proof.yaml                many methods and seeds, and their report
  cgrpo estimate configs/flux-kontext.yaml --num-devices 8  seconds, memory and cost of a run
  cgrpo doctor configs/flux-kontext.yaml                  is everything there that a run needs?
  cgrpo serve-reward rewards.yaml --port 8100             rewards for runs on other machines
"""

_EXIT_CODES = """\

exit codes:
  0        done
  1        a defect, with its traceback; of `cgrpo doctor`: it has found a problem
  2        an error that you can mend, in one line
  130      stopped by Ctrl-C
  128 + N  stopped by signal N, for example 143 by SIGTERM; a run has made a checkpoint
"""

_RESUME_HELP = """\
usage: cgrpo resume RUN [--allow-changed] [--section.field value ...]

Go on with a run that was stopped, from its newest checkpoint that is whole. What it computes is
what it would have computed without the break. Fields may be overridden: freely those that decide
where and how long a run goes (--train.num_updates 400, --device cpu), others with --allow-changed,
never those that what was trained depends on (generator, lora, ...).

examples:
  cgrpo resume runs/emoji
  cgrpo resume runs/emoji --train.num_updates 400   make a finished run longer
  cgrpo train configs/emoji.yaml --resume auto      begin, or go on: for job scripts
  (which takes --allow-changed too)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `cgrpo`; returns the exit code, as `_EXIT_CODES` has it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        if arguments[:1] in (["train"], ["resume"]):  # flags are fields of the config
            command = partial(_train if arguments[0] == "train" else _resume, arguments[1:])
        elif path := _asks_for_fields(arguments):
            command = partial(_print_benchmark_fields, path)
        else:
            options, overrides = _parse(arguments)
            command = partial(options.run, options, *overrides)
        _set_up_output()
        # Plugs by import path may lie beside the config, as modules do for `python -m`.
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        return command() or 0
    except Interrupted as interrupted:
        print(f"cgrpo: {_one_line(interrupted)}", file=sys.stderr)
        return 128 + interrupted.received
    except (CustomizedGRPOError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"cgrpo: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cgrpo: interrupted", file=sys.stderr)
        return 130


def _set_up_output() -> None:
    """Shows this package's log lines; of the libraries', errors only, unless the user asks."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("customized_grpo").setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # Pillow warns of what data/images.py refuses with an error.
    warnings.filterwarnings("ignore", message=".*could be decompression bomb")
    # torch says once that bfloat16 autocast cannot fuse an RMSNorm with float32 weights.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cgrpo",
        description=_ABOUT,
        epilog=_EXAMPLES + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("--debug", action="store_true", help="print a traceback with an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    init.add(commands)
    commands.add_parser("train", help="train a generator as a config says")
    commands.add_parser("resume", help="go on with a run that was stopped")

    replay = commands.add_parser(
        "replay",
        help="compute an update once more that had a gradient which is not finite",
        description="Compute an update once more from what a run has dumped, and say which "
        "weights, gradients, inputs and (sample, step) pairs are not finite.",
        epilog="example:\n  cgrpo replay runs/emoji/failures/000012",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    replay.add_argument("dump", metavar="DUMP", type=Path, help="folder under RUN/failures")
    replay.set_defaults(run=_replay)

    data = commands.add_parser(
        "data",
        help="check the data of a config and show the first training batch",
        description="Check the data of a config, count them, and draw the first training batch.",
        epilog="example:\n  cgrpo data configs/emoji.yaml --out batch.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of a run")
    data.add_argument(
        "--out", metavar="PNG", type=Path, default=Path("data.png"), help="default: data.png"
    )
    data.set_defaults(run=_data)

    evaluate = commands.add_parser(
        "evaluate",
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
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    target = "folder of a run, or YAML file of a benchmark"
    evaluate.add_argument("target", metavar="TARGET", type=Path, help=target)
    evaluate.add_argument(
        "--split",
        choices=("held_out", "validation"),
        help="of a run: validation examples are for tuning a recipe (default: held_out)",
    )
    evaluate.add_argument(
        "--num-examples",
        type=int,
        metavar="N",
        help="of a run: the standard error falls with their root (default: the run's)",
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON, no tables")
    evaluate.set_defaults(run=_evaluate)

    doctor.add(commands)
    generate.add(commands)
    export.add(commands)

    compare = commands.add_parser(
        "compare",
        help="run a study: methods x seeds, and put the results together",
        description="Run what is missing of a study (methods x seeds, from one YAML file), then "
        "write tables, figures and a report of it. Finished runs are never run twice: interrupt it "
        "and call it again.",
        epilog="examples:\n  cgrpo compare configs/studies/proof.yaml --jobs 2\n"
        "  cgrpo compare configs/studies/proof.yaml --results docs/results   from what is kept",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("study", metavar="STUDY", type=Path, help="YAML file of a study")
    compare.add_argument(
        "--jobs",
        type=positive,
        default=None,
        metavar="N",
        help="runs at a time, each with its share of the cores (default: one per core, on a GPU 1)",
    )
    compare.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="folder of results.json, tables, figures and report (default: the study's folder)",
    )
    compare.add_argument(
        "--cell",
        metavar="METHOD/seedN",
        help="run this one only, in this process: for clusters, an array job over the cells",
    )
    compare.set_defaults(run=_compare)

    report = commands.add_parser(
        "report",
        help="one HTML page of runs or of a study: tables, curves, pictures",
        description="Write one self-contained HTML page, and its figures as PNG, of evaluated runs "
        "(cgrpo evaluate) or of the results of a study (cgrpo compare). Runs that differ in their "
        "seed only count as one method.",
        epilog="examples:\n  cgrpo report runs/emoji\n"
        "  cgrpo report runs/mine runs/other --out both",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="folder of a run, or one of a study"
    )
    report.add_argument(
        "--out", metavar="DIR", type=Path, help="where to write (default: the first RUN)"
    )
    report.set_defaults(run=_report)

    demo = commands.add_parser(
        "demo",
        help="teach the embedded generator on this machine, then evaluate it",
        description="Train configs/emoji.yaml on this machine, then compare base and tuned.",
        epilog="example:\n  cgrpo demo --updates 20 --seed 1\n"
        "for any other field of the config: cgrpo train configs/emoji.yaml --section.field value",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("--updates", type=int, help="optimizer steps, an even number (default: 80)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the run (default: 0)")
    demo.set_defaults(run=_demo)

    estimate = commands.add_parser(
        "estimate",
        help="predict seconds, memory and cost of a run on given devices",
        description="Predict what a run takes on given devices: seconds per stage, memory per "
        "device, device hours and cost. Counted from the config; no weights are needed, nothing is "
        "trained. The rest of CONFIG's fields can be overridden as for `cgrpo train`.",
        epilog="examples:\n  cgrpo estimate configs/flux-kontext.yaml --device h100\n"
        "  cgrpo estimate configs/uno-paper.yaml --num-devices 64 --fsdp true --price 2.5\n"
        "  cgrpo estimate configs/flux-kontext.yaml --rollout.group_size 24 --lora.rank 256\n"
        "  cgrpo estimate configs/emoji.yaml --device local --benchmark mfu.json\n"
        "the model and what it leaves out: docs/performance.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    estimate.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of a run")
    device = "a100-80gb, h100 (default), h200, b200, l40s, rtx4090, cpu (one core), or local: "
    estimate.add_argument("--device", default="h100", help=device + "this machine, measured now")
    number = "devices of the run (default: 1)"
    estimate.add_argument("--num-devices", type=positive, default=1, metavar="N", help=number)
    mfu = "share of the bfloat16 peak that is reached (default: 0.4, assumed)"
    estimate.add_argument("--mfu", type=float, metavar="SHARE", help=mfu)
    measured = "take the shares from here: output of `python benchmarks/mfu.py --json`"
    estimate.add_argument("--benchmark", type=Path, metavar="FILE", help=measured)
    references = "square reference pictures per prompt (default: 1)"
    estimate.add_argument("--references", type=positive, default=1, metavar="N", help=references)
    text = "tokens of a prompt (default: what the generator pads to)"
    estimate.add_argument("--text-tokens", type=positive, metavar="N", help=text)
    estimate.add_argument("--price", type=float, help="of one device for one hour, for the cost")
    estimate.add_argument("--json", action="store_true", help="one line of JSON, no tables")
    estimate.set_defaults(run=_estimate)

    serve = commands.add_parser(
        "serve-reward",
        help="serve rewards over HTTP, for runs in other environments or on other machines",
        description="Serve the rewards of a YAML file (`rewards:`, as in a run's config), or of "
        "--reward, for `type: remote` rewards of runs. See docs/remote_rewards.md.",
        epilog="examples:\n  cgrpo serve-reward rewards.yaml --port 8100\n"
        "  cgrpo serve-reward --reward '{type: clip-text, path: openai/clip-vit-large-patch14}'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file of a server")
    reward = "a reward instead of a CONFIG; may be repeated"
    serve.add_argument("--reward", action="append", metavar="YAML", help=reward)
    serve.add_argument("--host", help="address to listen on (default: the config's, 127.0.0.1)")
    serve.add_argument("--port", type=int, help="0 = a free one (default: the config's, 8100)")
    serve.add_argument("--device", help="auto, cpu or cuda (default: the config's, auto)")
    token = "environment variable with the token that clients have to send"
    serve.add_argument("--token-env", metavar="NAME", help=token)
    serve.set_defaults(run=_serve_reward)

    completion.add(commands, parser)

    show_version = commands.add_parser("version", help="print the version")
    show_version.set_defaults(run=lambda options: print(_version()))
    return parser


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[list[str]]]:
    """Options, and what is left of the arguments for commands that override a config's fields."""
    parser = _parser()
    if arguments[:1] not in (["doctor"], ["estimate"], ["evaluate"]):
        return parser.parse_args(arguments), []
    options, overrides = parser.parse_known_args(arguments)
    return options, [overrides]


def _version() -> str:
    return f"customized-grpo {version('customized-grpo')}"


def _train(arguments: Sequence[str]) -> None:
    """`cgrpo train CONFIG [--section.field value ...]`."""
    config, *overrides = arguments or [""]
    is_flag = config.startswith("-")
    if {"-h", "--help"} & set(arguments):
        print(_train_help(None if is_flag else config))
        return
    if not config or is_flag:
        raise ConfigError(
            f"CONFIG must come first, got {config or 'nothing'}; write `cgrpo train CONFIG "
            "[--section.field value ...]`, for example `cgrpo train configs/emoji.yaml`"
        )
    allow_changed, overrides = _take_flag("--allow-changed", overrides)
    resume, overrides = _take_resume(overrides)
    if allow_changed and not resume:
        raise ConfigError("--allow-changed has no effect without --resume auto; leave it out")
    _train_config(config, overrides, resume=resume, allow_changed=allow_changed)


def _take_flag(name: str, flags: Sequence[str]) -> tuple[bool, list[str]]:
    return name in flags, [flag for flag in flags if flag != name]


def _take_resume(flags: Sequence[str]) -> tuple[bool, list[str]]:
    """`--resume auto` is no field of the config."""
    flags = [
        word
        for flag in flags
        for word in (flag.split("=", 1) if flag[:9] == "--resume=" else [flag])
    ]
    if "--resume" not in flags:
        return False, flags
    place = flags.index("--resume")
    if flags[place + 1 : place + 2] != ["auto"]:
        got = (*flags[place + 1 : place + 2], "nothing")[0]
        raise ConfigError(
            f"--resume must be auto, got {got!r}; it goes on with the run of that name, or begins "
            "it. To go on with a folder: `cgrpo resume RUN`"
        )
    return True, flags[:place] + flags[place + 2 :]


def _train_config(
    config_path: str | Path,
    overrides: Sequence[str],
    *,
    resume: bool = False,
    allow_changed: bool = False,
    lead_on: bool = True,
) -> Path:
    from customized_grpo.config import load_config

    config = load_config(config_path, overrides)

    from customized_grpo.trainer import train

    hide_loading_bars()
    run = train(config, resume=resume, allow_changed=allow_changed)
    _print_run(config, run, lead_on=lead_on)
    return run


def _print_run(config: RunConfig, run: Path, *, lead_on: bool = True) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes that torchrun has started
        print(f"run: {run}")
        if lead_on:
            next_step(*after_training(config, run))


def _resume(arguments: Sequence[str]) -> None:
    """`cgrpo resume RUN [--allow-changed] [--section.field value ...]`."""
    run, *flags = arguments or [""]
    if {"-h", "--help"} & set(arguments):
        print(_RESUME_HELP)
        return
    if not run or run.startswith("-"):
        raise ConfigError(
            f"RUN must come first, got {run or 'nothing'}; write `cgrpo resume RUN`, for example "
            "`cgrpo resume runs/emoji`"
        )
    from customized_grpo.resume import resumed_config

    allow_changed, overrides = _take_flag("--allow-changed", flags)
    config = resumed_config(Path(run), overrides)

    from customized_grpo.trainer import train

    hide_loading_bars()
    _print_run(config, train(config, resume=True, allow_changed=allow_changed))


def _replay(options: argparse.Namespace) -> None:
    from customized_grpo.replay import replay

    hide_loading_bars()
    print(replay(options.dump))


def _data(options: argparse.Namespace) -> None:
    from customized_grpo.config import load_config
    from customized_grpo.report.data import show_data

    print(show_data(load_config(options.config), options.out))
    print(f"picture: {options.out}")
    next_step("train", options.config)


def _evaluate(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    if _is_benchmark(options.target):
        _evaluate_benchmark(options, overrides)
        return
    if overrides:
        raise ConfigError(
            f"{overrides[0]} has no effect on a run, which is evaluated as its config says; see "
            "`cgrpo evaluate --help`"
        )
    split = options.split or "held_out"
    _evaluate_run(options.target, split, options.num_examples, as_json=options.json)


def _is_benchmark(target: str | Path) -> bool:
    return Path(target).suffix in (".yaml", ".yml")


def _asks_for_fields(arguments: Sequence[str]) -> str | None:
    """The file of `cgrpo evaluate FILE.yaml --help`, which argparse would not look at."""
    if arguments[:1] != ["evaluate"] or not {"-h", "--help"} & set(arguments):
        return None
    return next((word for word in arguments[1:] if _is_benchmark(word)), None)


def _print_benchmark_fields(path: str) -> None:
    from customized_grpo.config import load_benchmark

    print("usage: cgrpo evaluate TARGET [--section.field value ...] [--json]\n")
    print(f"fields, with the values of {path}:")
    print("\n".join(_field_lines(load_benchmark(path))))


def _evaluate_benchmark(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from customized_grpo.config import load_benchmark

    for flag in ("split", "num_examples"):
        if getattr(options, flag) is not None:
            name = flag.replace("_", "-")
            raise ConfigError(f"--{name} has no effect on a benchmark; leave it out")
    config = load_benchmark(options.target, overrides)

    from customized_grpo.benchmark.run import evaluate_benchmark
    from customized_grpo.benchmark.tables import markdown
    from customized_grpo.distributed import connected

    hide_loading_bars()
    with connected() as ranks:
        outcome = evaluate_benchmark(config, ranks)
    if outcome is None:  # the first process prints
        return
    if options.json:
        print(outcome.to_json(), end="")
        return
    print(markdown(outcome))
    print(f"gallery: {Path(config.output_dir) / config.name / 'gallery.html'}")


def _evaluate_run(
    run: Path,
    split: Literal["held_out", "validation"] = "held_out",
    num_examples: int | None = None,
    *,
    as_json: bool = False,
) -> None:
    from customized_grpo.evaluate import evaluate_run

    hide_loading_bars()
    report = evaluate_run(run, split, num_examples)
    if as_json:
        print(report.to_json(), end="")
        return
    print(f"picture: {report.picture}")
    print(report.table())
    next_step(*export_words(run))


def _compare(options: argparse.Namespace) -> None:
    from customized_grpo.compare import Study, compare, run_cell

    study = Study.load(options.study, options.results)
    hide_loading_bars()
    if options.cell is not None:
        for flag in ("jobs", "results"):
            if getattr(options, flag) is not None:
                raise ConfigError(f"--{flag} has no effect on a single --cell; leave it out")
        run_cell(study, *study.cell(options.cell))
        return

    from customized_grpo.report.page import check_extra, study_pictures, write_report
    from customized_grpo.report.tables import markdown

    check_extra()
    results = compare(study, options.jobs or _default_jobs())
    command = f"cgrpo compare {options.study}"
    command += f" --results {options.results}" if options.results else ""
    page = write_report(results, study.results, command, study_pictures(results, study.results))
    print(markdown(results))
    print(f"report: {page}")


def _report(options: argparse.Namespace) -> None:
    from customized_grpo.compare import RESULTS, results_of_runs
    from customized_grpo.report.page import run_pictures, study_pictures, write_report
    from customized_grpo.results import Results

    runs: list[Path] = options.runs
    folder = options.out or runs[0]
    if len(runs) == 1 and (runs[0] / RESULTS).exists():
        results = Results.read(runs[0] / RESULTS)
        pictures = study_pictures(results, runs[0])
    else:
        results, pictures = results_of_runs(runs), run_pictures(runs)
    command = " ".join(["cgrpo report", *map(str, runs)])
    command += f" --out {options.out}" if options.out else ""
    print(f"report: {write_report(results, folder, command, pictures)}")


def _estimate(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from customized_grpo.config import load_config

    config = load_config(options.config, overrides)

    from rich.console import Console

    from customized_grpo.estimate.cost import Cluster, estimate, read_mfu
    from customized_grpo.estimate.devices import find_device
    from customized_grpo.estimate.table import as_json, show
    from customized_grpo.estimate.workload import count_run

    rollout_mfu, update_mfu = read_mfu(options.mfu, options.benchmark)
    cluster = Cluster(
        device=find_device(options.device),
        num_devices=options.num_devices,
        fsdp=config.fsdp,
        rollout_mfu=rollout_mfu,
        update_mfu=update_mfu,
    )
    work = count_run(config, options.references, options.text_tokens)
    result = estimate(work, cluster)
    if options.json:
        print(as_json(work, cluster, result, options.price))
    else:
        show(work, cluster, result, options.price, Console())


def _serve_reward(options: argparse.Namespace) -> None:
    from customized_grpo.config import read_mapping
    from customized_grpo.config.yaml_text import parse_yaml
    from customized_grpo.serve.config import read_serve_config
    from customized_grpo.serve.server import serve

    if (options.config is None) == (options.reward is None):
        raise ConfigError(
            "serve-reward takes either CONFIG or --reward YAML, got "
            f"{'neither' if options.config is None else 'both'}; see `cgrpo serve-reward --help`"
        )
    if options.config is None:
        raw = {"rewards": [parse_yaml(text, "--reward") for text in options.reward]}
    else:
        raw = read_mapping(options.config, "CONFIG")
    flags = {name: getattr(options, name) for name in ("host", "port", "device", "token_env")}
    raw |= {name: value for name, value in flags.items() if value is not None}
    config = read_serve_config(raw, options.config or "serve-reward")
    names = ", ".join(reward.label for reward in config.rewards)
    serve(config, lambda url: print(f"serving {names} at {url}", flush=True))


def _default_jobs() -> int:
    import torch

    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def _demo(options: argparse.Namespace) -> None:
    from customized_grpo.config.shipped import shipped_config

    overrides = ["--name", _free_name(f"demo-seed{options.seed}"), "--seed", str(options.seed)]
    if options.updates is not None:
        overrides += ["--train.num_updates", str(options.updates)]
    _evaluate_run(_train_config(shipped_config("emoji.yaml"), overrides, lead_on=False))


def _free_name(name: str) -> str:
    """The name, numbered if runs/ has it already: a demo can be repeated."""
    numbered = (name, *(f"{name}-{i}" for i in range(2, 1000)))
    return next(n for n in numbered if not Path("runs", n).exists())


def _train_help(config_path: str | None) -> str:
    """All fields with their docs: of a config file with its values, or with the defaults."""
    from customized_grpo.config import RunConfig, load_config

    lines = [
        "usage: cgrpo train CONFIG [--section.field value ...]",
        "",
        "Train a generator as a YAML file says; flags override its fields. A whole section is",
        "replaced by YAML: --lora null, --advantage.schedule '{type: constant, prompt: 0.6}'.",
        "",
        "example:",
        "  cgrpo train configs/emoji.yaml --name mine --rollout.group_size 8",
        "",
        f"fields, with the values of {config_path}:"
        if config_path
        else "fields, with their defaults (`cgrpo train CONFIG --help`: also the plugs' fields):",
    ]
    return "\n".join(
        [*lines, *_field_lines(load_config(config_path) if config_path else RunConfig)]
    )


def _field_lines(config: Any) -> list[str]:
    """Fields of a config, or of a class of configs, with their docs."""
    from dataclasses import MISSING, is_dataclass

    from customized_grpo import registry
    from customized_grpo.config import list_fields
    from customized_grpo.config.decoding import show, to_raw

    groups = {
        "data": registry.DATA,
        "generator": registry.GENERATORS,
        "rewards": registry.REWARDS,
        "evaluators": registry.REWARDS,
        "metrics": registry.REWARDS,
    }
    lines: list[str] = []
    for info in list_fields(config):
        if info.is_section and (is_dataclass(info.value) or info.path in groups):
            types = groups.get(info.path)
            plugs = f" Types: {', '.join(registry.plug_types(types))}." if types else ""
            lines += ["", f"{info.path}: {info.doc}{plugs}"]
            continue
        value = "" if info.value is MISSING else f" = {show(to_raw(info.value))}"
        lines.append(f"  --{info.path}{value}  ({info.type})")
        lines += textwrap.wrap(info.doc, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines
