"""Markdown of the reference pages, made from what they describe: parsers, config fields, plugs."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from typing import Any, get_type_hints

from pydantic import TypeAdapter
from sphinx.pycode import ModuleAnalyzer

from customized_grpo import config, errors, ops, registry, types
from customized_grpo.cli import main as cli
from customized_grpo.config.decoding import members, show, to_raw, type_tag
from customized_grpo.config.overrides import FieldInfo, list_fields
from customized_grpo.data.base import DataSource
from customized_grpo.generators.base import Conditioning, Generator
from customized_grpo.ops import advantages, balance, forward, losses, schedules, sde
from customized_grpo.rewards import base as rewards
from customized_grpo.runs.sinks import base as sinks
from customized_grpo.tools.serve.config import ServeConfig

_FILES: dict[str, type] = {
    "A run: `cgrpo train CONFIG`": config.RunConfig,
    "A study: `cgrpo compare STUDY`": config.StudyConfig,
    "A benchmark: `cgrpo evaluate FILE.yaml`": config.BenchmarkConfig,
    "A reward server: `cgrpo serve-reward CONFIG`": ServeConfig,
}
_GROUPS = {
    "Data sources": registry.DATA,
    "Generators": registry.GENERATORS,
    "Rewards and evaluators": registry.REWARDS,
    "Algorithms": registry.ALGORITHMS,
    "Sinks": registry.SINKS,
}
_PLUG_POINTS = (
    *(config.Plug, config.Checkpoint, config.Host),
    *(config.DataConfig, DataSource, config.GeneratorConfig, Generator, Conditioning),
    *(config.RewardConfig, rewards.Reward, rewards.ImageEmbedder, rewards.RewardMetrics),
    *(rewards.PartialFailures, rewards.Budgeted),
    *(config.AlgorithmConfig, config.GrpoAlgorithm, config.ForwardAlgorithm),
    *(config.SinkConfig, sinks.Sink, sinks.RunInfo),
)


def command_line() -> str:
    """Every command, as its parser has it."""
    commands: Any = next(a for a in cli._parser()._actions if isinstance(a.choices, dict))
    rows = [(f"[`{c.dest}`](#cgrpo-{c.dest})", c.help) for c in commands._choices_actions]
    parts = [_table(("command", "purpose"), rows)]
    for name, parser in commands.choices.items():
        parts += [f"## `cgrpo {name}`", *_command(parser)]
    return _page(parts)


def _command(parser: argparse.ArgumentParser) -> list[str]:
    rows = [
        (f"`{_spelling(action)}`", action.help % vars(action) if action.help else "")
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
    ]
    usage = parser.format_usage().removeprefix("usage: ")
    epilog = _block(parser.epilog) if parser.epilog else ""
    return [parser.description or "", _block(usage), _table(("argument", "effect"), rows), epilog]


def _spelling(action: argparse.Action) -> str:
    values = action.metavar or ("|".join(action.choices) if action.choices else None)
    value = str(values or action.dest.upper()) if action.nargs != 0 else ""
    repeated = f"{value} ..." if action.nargs in ("+", "*") else value
    return f"{', '.join(action.option_strings)} {repeated}".strip()


def configuration() -> str:
    """Every field of every kind of file."""
    parts: list[str] = []
    for title, root in _FILES.items():
        parts += [f"## {title}", *_section(root, "")]
    return _page(parts)


def plugs() -> str:
    """Every declared data source, generator and reward, with the fields of its section."""
    parts: list[str] = []
    for title, group in _GROUPS.items():
        parts.append(f"## {title}")
        for name in registry.plug_types(group):
            cls = registry.load_plug(group, name)
            parts += [f"### `{name}`", *_section(cls, "")]
    return _page(parts)


def _section(cls: type, prefix: str) -> Iterator[str]:
    """The doc and the fields of a config class, then the sections inside it."""
    hints = get_type_hints(cls, include_extras=True)
    infos = [info for info in list_fields(cls) if "." not in info.path]
    yield inspect.getdoc(cls) or ""
    rows = [_field(info, f"{prefix}{info.path}", hints[info.path]) for info in infos]
    yield _table(("field", "default", "meaning"), rows)
    for info in infos:
        options: list[Any] = [
            m for m in members(hints[info.path]) if is_dataclass(m) and not _is_plug(m)
        ]
        several = "N." if info.kind.startswith("[") else ""
        for option in options:
            path = f"{prefix}{info.path}"
            kind = f", type: {type_tag(option)}" if len(options) > 1 else ""
            yield f"### `{path}`{kind}"
            yield from _section(option, f"{path}.{several}")


def _field(info: FieldInfo, path: str, hint: Any) -> tuple[str, str, str]:
    if any(map(_is_plug, members(hint))):
        rule = "See [plugs](plugs.md)."
    elif any(map(is_dataclass, members(hint))):
        return f"`{path}`", "", f"{info.doc} See below."
    else:
        rule = _requirement(TypeAdapter(hint).json_schema())
        rule = f"*{_sentence(rule)}.*" if rule else ""
    default = "required" if info.value is MISSING else f"`{show(to_raw(info.value), None)}`"
    return f"`{path}`", default, f"{info.doc} {rule}"


def _is_plug(cls: Any) -> bool:
    return is_dataclass(cls) and hasattr(cls, "group")


def _requirement(schema: dict[str, Any]) -> str:
    """What a value has to be, in words, from the schema that it is validated by."""
    match schema:
        case {"anyOf": options}:
            return " or ".join(map(_requirement, options))
        case {"const": _}:  # a type, which is its default
            return ""
        case {"enum": values}:
            return "one of " + ", ".join(map(str, values))
        case {"type": "array", "prefixItems": items}:
            return f"a list of {len(items)}: {', '.join(map(_requirement, items))}"
        case {"type": "array"}:
            return f"a list, each {_requirement(schema['items'])}"
    words = {"integer": "whole number", "string": "text", "boolean": "true or false"}
    kind = str(schema.get("type", "anything"))
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    limits = [f"{word} {schema[key]:,}" for key, word in bounds.items() if key in schema]
    return ", ".join([words.get(kind, "mapping" if kind == "object" else kind), *limits])


def api() -> str:
    """Docstrings of what others import."""
    parts = ["## `customized_grpo.ops`", inspect.getdoc(ops) or ""]
    for module in (sde, advantages, schedules, balance, losses, forward):
        title, _, rest = (inspect.getdoc(module) or "").partition(":")
        parts += [f"### {title}", _sentence(rest.strip())]
        parts += _operations(module)
    parts += ["## `customized_grpo.types`", inspect.getdoc(types) or ""]
    parts += [_member(types, cls.__name__) for cls in _own_classes(types)]
    parts += ["## Plug points", *(_documented(cls, "class") for cls in _PLUG_POINTS)]
    parts.append("## Configs from Python")
    functions = [name for name in config.__all__ if inspect.isfunction(getattr(config, name))]
    parts += [_member(config, name) for name in functions]
    parts += ["## `customized_grpo.errors`", inspect.getdoc(errors) or ""]
    parts += [_member(errors, cls.__name__) for cls in _own_classes(errors)]
    return _page(parts)


def _operations(module: Any) -> Iterator[str]:
    """What a module of `ops` gives to it, in the order of the source."""
    docs = ModuleAnalyzer.for_module(module.__name__).find_attr_docs()
    for name in (name for name in vars(module) if name in ops.__all__):
        found = getattr(module, name)
        if ("", name) in docs:
            names = f" Names: {', '.join(found)}." if isinstance(found, Mapping) else ""
            text = f"{' '.join(docs['', name])}{names}"
            yield f"```{{eval-rst}}\n.. py:data:: customized_grpo.ops.{name}\n\n   {text}\n```"
        elif found.__module__ == module.__name__:
            yield _member(ops, name)


def _own_classes(module: Any) -> list[type]:
    return [
        c
        for c in vars(module).values()
        if getattr(c, "__module__", "") == module.__name__ and inspect.isclass(c)
    ]


def _member(module: Any, name: str) -> str:
    found = getattr(module, name)
    kind = "class" if inspect.isclass(found) else "function"
    return _documented(found, kind, f"{module.__name__}.{name}")


def _documented(found: Any, kind: str, path: str = "") -> str:
    path = path or f"{found.__module__}.{found.__qualname__}"
    members = "\n   :members:" if kind == "class" else ""
    return f"```{{eval-rst}}\n.. auto{kind}:: {path}{members}\n```"


def _page(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (head, ["---"] * len(head), *rows)
    cells = ([" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) if rows else ""


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _block(text: str) -> str:
    return f"```text\n{text.strip()}\n```"


PAGES: dict[str, Callable[[], str]] = {
    "reference/api": api,
    "reference/cli": command_line,
    "reference/config": configuration,
    "reference/plugs": plugs,
}
"""Page -> what is added to it."""
