"""The fields of a configuration as help shows them and `--section.field value` changes them."""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from customized_grpo import registry
from customized_grpo.config.decoding import decode, default_of, members, show, to_raw
from customized_grpo.config.sections import RunConfig
from customized_grpo.config.yaml_text import parse_yaml
from customized_grpo.errors import ConfigError

T = TypeVar("T")

_WORDS: dict[Any, str] = {str: "text", bool: "true | false", type(None): "null"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldInfo:
    """A field of the configuration."""

    path: str
    """Dotted, as in the overrides."""

    hint: Any
    """Its type."""

    value: Any
    """The config's value, or the default; `dataclasses.MISSING` where there is none."""

    doc: str
    """The docstring under the field."""

    is_section: bool
    """Holds fields of its own; an override replaces it whole, by YAML."""

    @property
    def kind(self) -> str:
        """What a value may be, as users write it."""
        return _in_words(self.hint)


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
            hint=hints[f.name],
            value=value,
            doc=docs.get(f.name, ""),
            is_section=is_section,
        )
        if is_dataclass(value):
            yield from list_fields(value, f"{path}.")
        elif is_section and isinstance(value, tuple):
            for i, item in enumerate(value):
                yield from list_fields(item, f"{path}.{i}.")


def _in_words(hint: Any) -> str:
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(map(str, inside))
    if origin is dict:
        return f"{{{': '.join(map(_in_words, inside))}}}"
    if origin is tuple:
        repeated = inside[-1] is Ellipsis
        items = [_in_words(item) for item in inside if item is not Ellipsis]
        return f"[{', '.join([*items, *['...'] * repeated])}]"
    if inside:  # a union
        return " | ".join(map(_in_words, inside))
    return _WORDS.get(hint) or getattr(hint, "__name__", str(hint))


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
        config = _replaced(config, info, _read(info, values))
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


def _read(info: FieldInfo, words: list[str]) -> Any:
    """The value that the words of a flag stand for: YAML, but text and names are as they are."""
    if info.is_section:
        return parse_yaml(" ".join(words), f"--{info.path}")
    if info.path.endswith(".type"):
        section = info.path.removesuffix(".type")
        raise ConfigError(
            f"--{info.path} must not change alone, got {_line(words)}; the fields beside it "
            f"belong to the old type, replace them all: --{section} '{{type: ...}}'"
        )
    kinds = members(info.hint)

    def read(word: str) -> Any:
        is_text = str in kinds and not (word == "null" and type(None) in kinds)
        return word if is_text else parse_yaml(word, f"--{info.path}")

    is_list = _is_list(info.hint)
    items = [] if is_list and words == ["[]"] else [read(word) for word in words]
    if not any(isinstance(item, list) for item in items):
        if is_list and items != [None]:
            return items
        if len(items) == 1:
            return items[0]
    present = to_raw(info.value)
    fix = f"its present value is {show(present)}"
    if isinstance(present, list):
        example = _line(list(map(str, present)))
        fix = f"write its items with spaces between: --{info.path} {example}"
    raise ConfigError(
        f"--{info.path} must be one value ({info.kind}), got {_line(words) or 'nothing'}; {fix}"
    )


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is tuple or any(map(_is_list, get_args(hint)))


def _replaced(config: T, info: FieldInfo, value: Any) -> T:
    raw = node = to_raw(config)
    *parents, name = info.path.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[name] = value
    return decode(raw, "command line", type(config))
