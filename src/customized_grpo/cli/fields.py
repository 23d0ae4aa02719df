"""The fields of a config, for `--help`."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from customized_grpo.config.overrides import FieldInfo


class FieldsHelp(argparse._HelpAction):
    """Shows a command's help and, below it, the fields of the config that its target names."""

    def __init__(self, option_strings: list[str], config_of: Callable, **options: Any) -> None:
        super().__init__(option_strings, help="show this and the fields, and end", **options)
        self._config_of = config_of

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, *_: object) -> None:
        """``config_of`` gets the target, None without one; what it gives is shown, if any."""
        target: Path | None = getattr(namespace, "target", None)
        config = self._config_of(target)
        lines = [] if config is None else field_lines(config)
        parser.print_help()
        if lines:
            print(f"\nfields, with {f'the values of {target}' if target else 'their defaults'}:")
            print("\n".join(lines))
        parser.exit()


def field_lines(config: Any) -> list[str]:
    """Fields of a config, or of a class of configs, with their docs."""
    from dataclasses import MISSING, is_dataclass

    from customized_grpo import registry
    from customized_grpo.config import list_fields
    from customized_grpo.config.decoding import show, to_raw

    groups = {
        "data": registry.DATA,
        "generator": registry.GENERATORS,
        "algorithm": registry.ALGORITHMS,
        "rewards": registry.REWARDS,
        "evaluators": registry.REWARDS,
        "metrics": registry.REWARDS,
        "sinks": registry.SINKS,
    }
    lines: list[str] = []
    for info in list_fields(config):
        if info.is_section and (is_dataclass(info.value) or info.path in groups):
            types = groups.get(info.path)
            plugs = f" Types: {', '.join(registry.plug_types(types))}." if types else ""
            lines += ["", f"{info.path}: {info.doc}{plugs}"]
            # Algorithms are few and light to import.
            lines += [] if types and types != registry.ALGORITHMS else _alternatives(info)
            continue
        value = "" if info.value is MISSING else f" = {show(to_raw(info.value))}"
        lines.append(f"  --{info.path}{value}  ({info.kind})")
        lines += textwrap.wrap(info.doc, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines += _alternatives(info)
    return lines


def _alternatives(info: FieldInfo) -> list[str]:
    """What a section could be instead, with its fields."""
    from dataclasses import MISSING, fields, is_dataclass

    from customized_grpo import registry
    from customized_grpo.config import AlgorithmConfig, list_fields
    from customized_grpo.config.decoding import default_of, members, show, to_raw
    from customized_grpo.errors import ConfigError

    lines, kinds = list[str](), members(info.hint)
    if AlgorithmConfig in kinds:
        group = registry.ALGORITHMS
        kinds = []
        for name in registry.plug_types(group):
            with suppress(ConfigError):  # another package's, which this config does not use
                kinds.append(registry.load_plug(group, name))
    for kind in kinds:
        if not (inspect.isclass(kind) and is_dataclass(kind)) or type(info.value) is kind:
            continue
        own = sorted(fields(kind), key=lambda f: f.name != "type")
        given = {f.name: default_of(f) for f in own}
        values = {name: "..." if v is MISSING else to_raw(v) for name, v in given.items()}
        about = (inspect.getdoc(kind) or "").partition("\n\n")[0]
        text = f"or {show(values, None)}: {about}"
        lines += textwrap.wrap(text, 92, initial_indent=" " * 6, subsequent_indent=" " * 8)
        for part in list_fields(kind):
            if part.path not in ("type", "method") and part.doc:
                own = f"{part.path}: {part.doc}"
                lines += textwrap.wrap(own, 92, initial_indent=" " * 10, subsequent_indent=" " * 12)
    return lines
