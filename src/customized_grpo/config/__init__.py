"""The configuration of a run: frozen dataclasses, decoded strictly from YAML and flags.

`load_config` reads a file, applies `--section.field value` overrides and checks the result;
`dump_config` writes one that loads back equal. Nothing is coerced, ignored or silently changed.
"""

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from customized_grpo.config.algorithms import (
    AwmAlgorithm,
    ForwardAlgorithm,
    GrpoAlgorithm,
    NftAlgorithm,
)
from customized_grpo.config.benchmark import (
    BenchmarkConfig,
    DreamBenchSet,
    EmojiSet,
    JsonlSet,
    SamplingConfig,
    benchmark_conflicts,
)
from customized_grpo.config.checks import conflicts, explain_batch
from customized_grpo.config.decoding import decode, show, to_raw
from customized_grpo.config.faults import FaultConfig
from customized_grpo.config.overrides import FieldInfo, apply_overrides, list_fields
from customized_grpo.config.plugs import (
    AlgorithmConfig,
    Checkpoint,
    DataConfig,
    GeneratorConfig,
    Host,
    Plug,
    RewardConfig,
    SinkConfig,
    find_checkpoints,
    revisions,
)
from customized_grpo.config.schedules import (
    BalanceSettings,
    ConstantSchedule,
    CosineSchedule,
    CustomSchedule,
    LinearSchedule,
    MeasuredSchedule,
    ScheduleConfig,
    TdwSchedule,
)
from customized_grpo.config.sections import (
    AdvantageConfig,
    CacheConfig,
    EvaluationConfig,
    LoraSettings,
    LossConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from customized_grpo.config.shipped import shipped_config
from customized_grpo.config.study import Method, StudyConfig, first_difference, mistakes
from customized_grpo.config.yaml_text import Dumper, parse_yaml
from customized_grpo.errors import ConfigError
from customized_grpo.files import load_text
from customized_grpo.registry import nearest, one_of

__all__ = [
    "AdvantageConfig",
    "AlgorithmConfig",
    "AwmAlgorithm",
    "BalanceSettings",
    "BenchmarkConfig",
    "CacheConfig",
    "Checkpoint",
    "ConstantSchedule",
    "CosineSchedule",
    "CustomSchedule",
    "DataConfig",
    "DreamBenchSet",
    "EmojiSet",
    "EvaluationConfig",
    "FaultConfig",
    "FieldInfo",
    "ForwardAlgorithm",
    "GeneratorConfig",
    "GrpoAlgorithm",
    "Host",
    "JsonlSet",
    "LinearSchedule",
    "LoraSettings",
    "LossConfig",
    "MeasuredSchedule",
    "Method",
    "NftAlgorithm",
    "Plug",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "SinkConfig",
    "StudyConfig",
    "TdwSchedule",
    "TrainConfig",
    "added_method",
    "check_config",
    "dump_config",
    "explain_batch",
    "find_checkpoints",
    "first_difference",
    "list_fields",
    "load_benchmark",
    "load_config",
    "load_study",
    "read_config",
    "read_mapping",
    "revisions",
]


_MAX_BYTES = 1_000_000


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, has_begun: bool = False
) -> RunConfig:
    """Reads a run's YAML file, applies overrides and checks everything.

    An override is `--section.field value` (also `--section.field=value`, hyphens for underscores,
    several values for a list), written as in the file, text without quotes. A whole section
    (`lora`, `rewards`, `advantage.schedule`, ...) is replaced by YAML: `--lora null`,
    `--advantage.schedule '{type: constant, prompt: 0.6}'`. They apply in order; what fields demand
    of each other is checked once, at the end. A run that `has_begun` keeps what was allowed then,
    maybe by an older version.

    Raises:
        ConfigError: naming the file or flag, the field, what it must be, what it is and the fix.
    """
    source = str(path)
    written = decode(read_mapping(source, "CONFIG"), source)
    allowed = conflicts(written) if has_begun else ()
    config = apply_overrides(written, overrides)
    return check_config(config, f"{source} with overrides" if overrides else source, allowed)


def read_config(text: str, source: str) -> RunConfig:
    """Decodes and checks the YAML of a run; `source` opens the message of an error.

    Raises:
        ConfigError: at the first mistake.
    """
    return check_config(decode(_as_mapping(text, source), source), source)


def read_mapping(source: str, argument: str) -> dict[str, Any]:
    """Reads the top level of a YAML file; `argument` is what the command line calls it.

    Raises:
        ConfigError: if it cannot be read or is no mapping.
    """
    try:
        text = load_text(Path(source), _MAX_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        inside = Path(source, "config.yaml")
        meant = (inside, shipped_config(f"{Path(source).stem}.yaml"))
        there = next((path for path in meant if os.path.isfile(path)), None)
        fix = f"write {there}" if there else "check the path"
        raise ConfigError(
            f"{argument} must be a readable YAML file, got {source!r}: {reason}; {fix}"
        ) from error
    return _as_mapping(text, source)


def _as_mapping(text: str, source: str) -> dict[str, Any]:
    raw = parse_yaml(text, source)
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{source}: the file must be a mapping of sections, got {show(raw)}; see configs/"
        )
    return raw


def load_benchmark(path: str | Path, overrides: Sequence[str] = ()) -> BenchmarkConfig:
    """Reads a benchmark's YAML file, applies overrides as `load_config` does, checks everything.

    Raises:
        ConfigError: naming the file or flag, the field, what it must be, what it is and the fix.
    """
    source = str(path)
    config = decode(read_mapping(source, "TARGET"), source, BenchmarkConfig)
    config = apply_overrides(config, overrides)
    for conflict in benchmark_conflicts(config):
        raise ConfigError(f"{source}{' with overrides' if overrides else ''}: {conflict}")
    return config


def added_method(text: str) -> Method:
    """A method written `NAME={FIELD: VALUE, ...}`, or `NAME=FILE` of such a mapping.

    Raises:
        ConfigError: naming the method, what it must be, what it is and the fix.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(
            f"--add must be NAME=OVERRIDES or NAME=FILE, got {text!r}; write for example "
            f"--add {shlex.quote(f'{name}={{advantage.gamma: 0.2}}')}"
        )
    source = f"--add {name}"
    is_inline = value.lstrip().startswith("{")
    overrides = parse_yaml(value, source) if is_inline else read_mapping(value, source)
    return decode({"name": name, "label": name, "overrides": overrides}, source, Method)


def load_study(
    path: str | Path, added: Sequence[Method] = ()
) -> tuple[StudyConfig, dict[str, RunConfig]]:
    """Reads a study and the configs of its methods, by name, each checked; seed 0.

    `added` are further methods, after those of the file.

    Raises:
        ConfigError: naming the file, the field or method, what it is and the fix.
    """
    source = str(path)
    study = decode(read_mapping(source, "STUDY"), source, StudyConfig)
    if added:
        source = f"{source} with --add"
        study = replace(study, methods=(*study.methods, *added))
    names = [method.name for method in study.methods]
    for mistake in mistakes(study):
        raise ConfigError(f"{source}: {mistake}")
    if study.main not in names:
        raise ConfigError(
            f"{source}: main must be the name of a method, got {study.main!r}; "
            f"{nearest(study.main, names) or one_of(names)}"
        )
    base = Path(path).parent / study.config
    configs = {}
    for method in study.methods:
        try:
            config = load_config(base, study.flags(method))
        except ConfigError as error:
            raise ConfigError(f"{source}: method {method.name!r}: {error}") from error
        configs[method.name] = study.place(config, method, seed=0)
    for method in study.methods[1:]:
        if field := first_difference(configs[names[0]], configs[method.name]):
            raise ConfigError(
                f"{source}: method {method.name!r}: {field} must be the same in all methods, which "
                "are judged against one base; move it to the study's overrides"
            )
    return study, configs


def check_config(
    config: RunConfig, source: str = "config", allowed: Iterable[str] = ()
) -> RunConfig:
    """Checks every field and what fields demand of each other; returns the config.

    For configs made in Python: constructing the dataclasses checks nothing. `allowed` are conflicts
    to let pass, as `conflicts` words them.

    Raises:
        ConfigError: at the first mistake; `source` opens the message.
    """
    config = decode(to_raw(config), source)
    known = set(allowed)
    for conflict in conflicts(config):
        if conflict not in known:
            raise ConfigError(f"{source}: {conflict}")
    return config


def dump_config(config: RunConfig) -> str:
    """Returns YAML that `load_config` reads back as an equal config."""
    return yaml.dump(to_raw(config), Dumper=Dumper, sort_keys=False)
