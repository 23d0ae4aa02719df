"""Plugs by entry point: a `type` in a config file names a config class, here or in any package.

A package offers a generator, reward, algorithm, data source or sink by an entry point in its
`pyproject.toml`:

    [project.entry-points."customized_grpo.rewards"]
    my-reward = "my_package.rewards:MyRewardConfig"

The built-in plugs are declared in the same way. Without an entry point, the import path itself
works as a type: `type: "my_package.rewards:MyRewardConfig"`.
"""

import difflib
import importlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from customized_grpo.errors import ConfigError

GENERATORS = "customized_grpo.generators"
REWARDS = "customized_grpo.rewards"
ALGORITHMS = "customized_grpo.algorithms"
DATA = "customized_grpo.data"
SINKS = "customized_grpo.sinks"


@cache
def plug_types(group: str) -> dict[str, str]:
    """Returns the declared types of a group: name -> `package.module:Class`; imports none of them.

    Raises:
        ConfigError: if two packages declare the same name for different classes.
    """
    targets: dict[str, str] = {}
    for entry_point in entry_points(group=group):
        other = targets.setdefault(entry_point.name, entry_point.value)
        if other != entry_point.value:
            raise ConfigError(
                f"type {entry_point.name!r} of {group} must be declared once, got {other} and "
                f"{entry_point.value}; uninstall one, or write the import path as the type"
            )
    return dict(sorted(targets.items()))


def load_plug(group: str, type_: Any) -> Any:
    """Returns the config class that `type_` names: an entry point of `group`, or an import path.

    Raises:
        ConfigError: if there is no such type, or it cannot be imported.
    """
    targets = plug_types(group)
    if isinstance(type_, str) and (type_ in targets or ":" in type_):
        return import_object(targets.get(type_, type_))
    fix = nearest(str(type_), targets) or "correct it, or install the package that declares it"
    raise ConfigError(
        f"type must be {one_of(targets)}, or an import path package.module:Class, "
        f"got {'nothing' if type_ is None else repr(type_)}; {fix}"
    )


def type_of(group: str, cls: type) -> str:
    """Returns the type under which `load_plug` finds `cls`: its entry point or its import path."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for name, target in plug_types(group).items() if target == path), path)


def import_object(target: str, field: str = "type") -> Any:
    """Imports `package.module:name`.

    Raises:
        ConfigError: if the path is malformed, or the module or the name in it does not exist;
            `field` opens the message.
    """
    module_name, _, name = target.partition(":")
    if not (module_name and name) or module_name.startswith("."):
        raise ConfigError(
            f"{field} must be an import path package.module:name, got {target!r}; write it in full"
        )
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything while it is imported
        raise ConfigError(
            f"{field} must be importable, got {target!r}: {' '.join(str(error).split())}; install "
            "what is missing, or correct the path"
        ) from error
    if not hasattr(found, name):
        fix = nearest(name, vars(found)) or "correct the name"
        raise ConfigError(f"{field} must exist, got {target!r}: no {name!r} in its module; {fix}")
    return getattr(found, name)


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """Returns `did you mean 'x'?` for the valid name closest to a mistyped one, or None."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"did you mean {matches[0]!r}?" if matches else None


def one_of(valid: Iterable[str]) -> str:
    """Returns `one of a, b, c`."""
    return "one of " + ", ".join(valid)
