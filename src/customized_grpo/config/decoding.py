"""Strict decoding of plain values into config dataclasses, and one line about what is wrong."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from customized_grpo import registry
from customized_grpo.config.plugs import adapter, load_plug
from customized_grpo.config.sections import RunConfig
from customized_grpo.errors import ConfigError

T = TypeVar("T")

_MAX_VALUES = 100_000  # a few aliases of YAML can stand for more values than there is memory
_MAX_DEPTH = 50


def to_raw(value: Any) -> Any:
    """Returns a config as the dicts, lists and scalars that decode to it."""
    if is_dataclass(value):
        raw = {f.name: to_raw(getattr(value, f.name)) for f in fields(value)}
        group = getattr(value, "group", None)
        return raw if group is None else raw | {"type": registry.type_of(group, type(value))}
    if isinstance(value, Mapping):
        return {key: to_raw(item) for key, item in value.items()}
    return [to_raw(item) for item in value] if isinstance(value, (tuple, list)) else value


def decode(raw: Any, source: str, cls: type[T] = RunConfig) -> T:
    """Decodes without coercion; fields are checked one by one, not against each other.

    Raises:
        ConfigError: one line about the first mistake, opened by `source`.
    """
    try:
        _check_plain(raw)
        return adapter(cls).validate_json(json.dumps([raw]))[0]
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error, raw, cls)}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except (TypeError, ValueError) as error:  # of json.dumps: binary data, a list inside itself
        raise ConfigError(f"{source}: the values must be plain YAML, got: {error}") from error


def _check_plain(raw: Any) -> None:
    """Refuses what no file system, tokenizer or text file takes, and what would never end."""
    left: list[tuple[tuple[str, ...], Any]] = [((), raw)]
    for _ in range(_MAX_VALUES):
        if not left:
            return
        path, value = left.pop()
        if len(path) > _MAX_DEPTH:
            raise ConfigError(f"{path[0]} must be nested at most {_MAX_DEPTH} deep; flatten it")
        if isinstance(value, dict):
            left += [((*path, f"the key {show(k)}"), k) for k in value if isinstance(k, str)]
            left += [((*path, str(key)), item) for key, item in value.items()]
        elif isinstance(value, list):
            left += [((*path, str(i)), item) for i, item in enumerate(value)]
        elif isinstance(value, str) and not is_clean(value):
            raise ConfigError(
                f"{'.'.join(path)} must be text without nul bytes and lone surrogates, got "
                f"{json.dumps(value)[:60]}; remove them"
            )
    raise ConfigError(f"the text must stand for at most {_MAX_VALUES:,} values; shorten it")


def is_clean(text: str) -> bool:
    """Whether a text can be a path, be written as UTF-8 and be tokenized."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _explain(error: ValidationError, raw: Any, root: type) -> str:
    """One line about the first mistake: dotted path, requirement, value received, fix."""
    # A misspelt key also counts as a missing one; the misspelling is the news.
    details = sorted(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
    path = _path_in(raw, details[0]["loc"])
    section = _dataclass_at(path[:-1], raw, root)
    siblings = {f.name: f for f in fields(section)} if section else {}
    name = str(path[-1]) if path else ""
    if details[0]["type"].startswith("union_tag"):
        what = _wrong_tag(details[0], get_type_hints(section)[name])
    else:
        what = _requirement(details[0], name, siblings)
    return ".".join(map(str, path)) + what


def _requirement(detail: Any, name: str, siblings: Mapping[str, Any]) -> str:
    """Says what the field must be, what it is, and the fix."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "plug":
        return detail["msg"]
    if kind == "missing":
        return f" must be given, got nothing; add {f'`{name}: ...`' if name in siblings else 'it'}"
    if kind == "unexpected_keyword_argument":
        fix = registry.nearest(name, siblings) or f"use {registry.one_of(siblings)}"
        return f" must be a known field, got {show(name)}; {fix}"
    if kind == "value_error":
        return f": {detail['msg'].removeprefix('Value error, ')}"
    message = re.sub(r"^(Input|Tuple|List|String|Value) should", "must", detail["msg"])
    message = (
        message.replace("an object", "a mapping")
        .replace("valid array", "list")
        .replace(" after validation", "")
    )
    default = default_of(siblings[name]) if name in siblings else MISSING
    fix = "correct it" if default is MISSING else f"the default is {show(to_raw(default))}"
    fix = {"bool_type": "write true or false", "string_type": "quote it"}.get(kind, fix)
    if kind == "literal_error":
        fix = registry.nearest(str(value), re.findall(r"'(.+?)'", context["expected"])) or fix
    return f" {message}, got {show(value)}; {fix}"


def _wrong_tag(detail: Any, union: Any) -> str:
    types = [type_tag(option) for option in members(union)]
    tag = detail.get("ctx", {}).get("tag", "")
    fix = registry.nearest(tag, types) or "write `type: ...`"
    return f".type must be {registry.one_of(types)}, got {tag or 'nothing'}; {fix}"


def _path_in(raw: Any, loc: tuple[Any, ...]) -> list[Any]:
    """Drops what pydantic puts into a location besides the keys of `raw`: tuples, union tags."""
    path: list[Any] = []
    for i, part in enumerate(loc[1:], start=2):
        is_list = isinstance(raw, list)
        if part in (range(len(raw)) if is_list else raw if isinstance(raw, dict) else ()):
            raw = raw[part]
            path.append(part)
        elif i == len(loc) and is_list == isinstance(part, int):  # a missing or surplus entry
            path.append(part)
    return path


def _dataclass_at(path: Sequence[Any], raw: Any, root: type) -> Any:
    """Returns the dataclass that the section at `path` of a `root` decodes to, or None."""
    hint: Any = root
    for part in path:
        if isinstance(part, str):
            cls = _choose_dataclass(hint, raw)
            hint = get_type_hints(cls)[part] if cls else None
        raw = raw[part]
    return _choose_dataclass(hint, raw)


def _choose_dataclass(hint: Any, raw: Any) -> Any:
    options = [option for option in members(hint) if is_dataclass(option)]
    type_ = raw.get("type") if isinstance(raw, dict) else None
    for option in options:
        if hasattr(option, "group"):
            return load_plug(option, type_) if type_ else option
        if len(options) == 1 or type_tag(option) == type_:
            return option
    return None


def members(hint: Any) -> list[Any]:
    """Flattens unions, tuples and annotations to the plain types inside; a dict stays a dict."""
    if get_origin(hint) is Annotated:
        return members(get_args(hint)[0])
    if get_origin(hint) is dict or not get_args(hint):
        return [get_origin(hint) or hint]
    return [member for argument in get_args(hint) for member in members(argument)]


def type_tag(cls: Any) -> str:
    """Returns the default of a config class's `type`."""
    return next(str(f.default) for f in fields(cls) if f.name == "type")


def default_of(f: Any) -> Any:
    """Returns a dataclass field's default, made if need be; `MISSING` if it has none."""
    return f.default_factory() if f.default_factory is not MISSING else f.default


def show(value: Any, limit: int | None = 60) -> str:
    """Writes a value as the files spell it, shortened to a number of characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if limit is None or len(text) <= limit else f"{text[: limit - 3]}..."
