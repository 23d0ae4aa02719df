"""YAML as the configuration reads and writes it."""

import re
from typing import Any, ClassVar

import yaml

from customized_grpo.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: 1e-4 is a number and `no` is text; duplicate keys and tags are
    refused."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def fetch_tag(self) -> None:
        raise yaml.MarkedYAMLError(
            problem="a tag such as !!python/object has no meaning here; remove it, or quote the "
            "text that starts with !",
            problem_mark=self.get_mark(),
        )

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key {key.value!r}; keep one", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or `_Loader` would not read as text."""


for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
):
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first
        )


def parse_yaml(text: str, source: str) -> Any:
    """Returns the value that a YAML text stands for.

    Raises:
        ConfigError: naming the line and the problem, opened by `source`.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{source}: line {line} must be valid YAML: {error.problem}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: the text must be nested less deeply; flatten it") from error
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{source}: the text must be valid YAML: {reason}") from error
