"""The fields of a configuration as help shows them and `--section.field value` changes them."""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from io import StringIO
from itertools import pairwise
from typing import Any, TypeVar, get_type_hints

from customized_grpo import registry
from customized_grpo.config.decoding import decode, default_of, members, show, to_raw
from customized_grpo.config.sections import RunConfig
from customized_grpo.config.yaml_text import parse_yaml
from customized_grpo.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldInfo:
    """A field of the configuration."""

    path: str
    """Dotted, as in the overrides."""

    type: str
    """Its type as the source spells it."""

    value: Any
    """The config's value, or the default; `dataclasses.MISSING` where there is none."""

    doc: str
    """The docstring under the field."""

    is_section: bool
    """Holds fields of its own; an override replaces it whole, by YAML."""


def list_fields(section: Any = RunConfig, prefix: str = "") -> Iterator[FieldInfo]:
    """Yields every field of a config (or, for a class, of its defaults), sections before theirs."""
    is_class = inspect.isclass(section)
    hints = get_type_hints(section if is_class else type(section))
    docs = _field_docs(section if is_class else type(section))
    for f in fields(section):
        value = default_of(f) if is_class else getattr(section, f.name)
        is_section = any(is_dataclass(t) or t is dict for t in members(hints[f.name]))
        path = f"{prefix}{f.name}"
        yield FieldInfo(
            path=path,
            type=f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type)),
            value=value,
            doc=docs.get(f.name, ""),
            is_section=is_section,
        )
        if is_dataclass(value):
            yield from list_fields(value, f"{path}.")
        elif is_section and isinstance(value, tuple):
            for i, item in enumerate(value):
                yield from list_fields(item, f"{path}.{i}.")


@cache
def _field_docs(cls: type) -> dict[str, str]:
    """Reads the docstrings under the fields of a dataclass and its base from their source."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # a class made at run time has no source to read
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for node, below in pairwise(body):
            match node, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(doc))),
                ):
                    docs[name] = " ".join(doc.split())
    return docs


def apply_overrides(config: T, overrides: Sequence[str]) -> T:
    """Applies `--section.field value ...` tokens in order, see `load_config`.

    Raises:
        ConfigError: naming the flag, what it must be, what it is and the fix.
    """
    for flag, values in _split_flags(overrides):
        known = {_canonical(f"--{info.path}"): info for info in list_fields(config)}
        info = known.get(_canonical(flag))
        if info is None:
            fix = registry.nearest(flag, known)
            command = "train" if isinstance(config, RunConfig) else "evaluate"
            fix = fix or f"see `cgrpo {command} CONFIG --help`"
            raise ConfigError(f"override must be a field of the config, got {_line([flag])}; {fix}")
        change = _replace_section if info.is_section else _replace_field
        config = change(config, info, values)
    return config


def _line(words: Sequence[str]) -> str:
    return " ".join(" ".join(words).split())


def _canonical(flag: str) -> str:
    return "--" + flag.removeprefix("--").replace("-", "_")


def _split_flags(overrides: Sequence[str]) -> list[tuple[str, list[str]]]:
    flags: list[tuple[str, list[str]]] = []
    for token in overrides:
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            flags.append((flag, [value] if equals else []))
        elif flags:
            flags[-1][1].append(token)
        else:
            raise ConfigError(
                f"override must start with a flag, got {token!r}; write --section.field {token}"
            )
    return flags


def _replace_section(config: T, info: FieldInfo, values: list[str]) -> T:
    raw = node = to_raw(config)
    *parents, name = info.path.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[name] = parse_yaml(" ".join(values), f"--{info.path}")
    return decode(raw, "command line", type(config))


def _replace_field(config: T, info: FieldInfo, values: list[str]) -> T:
    import tyro

    if info.path.endswith(".type"):
        section = info.path.removesuffix(".type")
        raise ConfigError(
            f"--{info.path} must not change alone, got {_line(values)}; the fields beside it "
            f"belong to the old type, replace them all: --{section} '{{type: ...}}'"
        )
    try:
        # tyro frames its messages; an error here is one line.
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            changed = tyro.cli(
                type(config),
                default=config,
                args=[f"--{info.path}", *values],
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
                registry=_yaml_spelling(),
            )
    except SystemExit:
        _replace_section(config, info, values)  # says what is wrong, if it is the value
        present = to_raw(info.value)
        fix = f"its present value is {show(present)}"
        if isinstance(present, list):
            items = _line(list(map(str, present)))
            fix = f"write its items with spaces between: --{info.path} {items}"
        raise ConfigError(
            f"--{info.path} must be one {info.type}, got {_line(values) or 'nothing'}; {fix}"
        ) from None
    return decode(to_raw(changed), "command line", type(config))


@cache
def _yaml_spelling() -> Any:
    """Makes tyro read true, false and null as the config files spell them."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    constructors = ConstructorRegistry()

    @constructors.primitive_rule
    def rule(info: Any) -> PrimitiveConstructorSpec[Any] | None:
        words = {bool: {"true": True, "false": False}, type(None): {"null": None}}.get(info.type)
        return words and PrimitiveConstructorSpec(
            nargs=1,
            metavar="|".join(words),
            instance_from_str=lambda args: words[args[0]],
            is_instance=lambda value: value in words.values(),
            str_from_instance=lambda value: [json.dumps(value)],
            choices=tuple(words),
        )

    return constructors
