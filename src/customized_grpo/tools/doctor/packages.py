"""Python and packages against what this package's metadata ask for."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, metadata, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from customized_grpo.tools.doctor.findings import Finding, ok, problem, warning

PACKAGE = "customized-grpo"
_SHOWN = ("torch", "diffusers", "transformers", "peft")
_CONTRIBUTORS = ("dev", "docs")


def packages(package: str = PACKAGE) -> Iterator[Finding]:
    """Versions, and extras that are not there.

    Args:
        package: installed distribution whose metadata are read.
    """
    about = metadata(package)
    wanted = [Requirement(text) for text in about.get_all("Requires-Dist") or ()]
    plain = [r for r in wanted if _is_wanted(r)]
    (python,) = about.get_all("Requires-Python") or [""]
    yield _python(python)
    yield from _required(package, plain)
    extras = {
        name: [r for r in wanted if r not in plain and _is_wanted(r, name)]
        for name in about.get_all("Provides-Extra") or ()
        if name not in _CONTRIBUTORS
    }
    yield from _extras(package, extras)


def _is_wanted(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _python(required: str) -> Finding:
    found = platform.python_version()
    if SpecifierSet(required).contains(found, prereleases=True):
        return ok("python", found)
    fix = f"make an environment with a Python {required}"
    return problem("python", f"{found}, but {required} is needed", fix)


def _required(package: str, requirements: Sequence[Requirement]) -> Iterator[Finding]:
    lacking = [r for r in requirements if not _is_met(r)]
    for requirement in lacking:
        fix = f"pip install '{requirement.name}{requirement.specifier}'"
        yield problem(f"package {requirement.name}", _mismatch(requirement), fix)
    others = len(requirements) - len(lacking) - sum(r.name in _SHOWN for r in requirements)
    shown = ", ".join(f"{name} {installed(name)}" for name in _SHOWN if installed(name))
    if not lacking:
        own = f"{package} {version(package)}"
        yield ok("packages", f"{own}; {shown} and {others} others are as they should be")


def _extras(package: str, extras: dict[str, list[Requirement]]) -> Iterator[Finding]:
    there = []
    for extra, requirements in extras.items():
        if lacking := [_mismatch(r) for r in requirements if not _is_met(r)]:
            fix = f"pip install '{package}[{extra}]'"
            yield warning(f"extra {extra}", "; ".join(lacking), fix)
        else:
            there.append(extra)
    yield ok("extras", f"there are {', '.join(there) or 'none'}")


def _mismatch(requirement: Requirement) -> str:
    found = installed(requirement.name)
    wanted = f"{requirement.name}{requirement.specifier}"
    return f"{wanted} is needed, {f'{found} is installed' if found else 'it is not installed'}"


def _is_met(requirement: Requirement) -> bool:
    found = installed(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def installed(name: str) -> str | None:
    """Version of a distribution; None: it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
