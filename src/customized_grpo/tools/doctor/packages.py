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
_CONTRIBUTORS = {"dev", "docs"}


def packages(package: str = PACKAGE) -> Iterator[Finding]:
    """Versions, and which extras there are, by the metadata of an installed package.

    One that is not installed is no fault: what a config needs is said by the plug that needs it.
    """
    about = metadata(package)
    wanted = [Requirement(text) for text in about.get_all("Requires-Dist") or ()]
    (python,) = about.get_all("Requires-Python") or [""]
    found = platform.python_version()
    if SpecifierSet(python).contains(found, prereleases=True):
        yield ok("python", found)
    else:
        fix = f"make an environment with a Python {python}"
        yield problem("python", f"{found}, but {python} is needed", fix)
    lacking = _lacking(wanted)
    for requirement, text in lacking.items():
        fix = f"pip install '{requirement.name}{requirement.specifier}'"
        yield problem(f"package {requirement.name}", text, fix)
    if not lacking:
        shown = [f"{name} {installed(name)}" for name in (package, *_SHOWN) if installed(name)]
        yield ok("packages", f"{', '.join(shown)} and all others are as they should be")
    there, absent = [], []
    for extra in sorted(set(about.get_all("Provides-Extra") or ()) - _CONTRIBUTORS):
        lacking = _lacking(wanted, extra)
        (absent if lacking else there).append(extra)
        if old := [text for requirement, text in lacking.items() if installed(requirement.name)]:
            yield warning(f"extra {extra}", "; ".join(old), f"pip install '{package}[{extra}]'")
    rest = f"; not installed: {', '.join(absent)}" if absent else ""
    yield ok("extras", f"there are {', '.join(there) or 'none'}{rest}")


def _lacking(requirements: Sequence[Requirement], extra: str = "") -> dict[Requirement, str]:
    """What an extra needs that is not there, and what is there instead; '' = the package itself."""
    found = {}
    for requirement in requirements:
        marker, here = requirement.marker, installed(requirement.name)
        is_wanted = marker.evaluate({"extra": extra}) if marker else not extra
        if is_wanted and not (here and requirement.specifier.contains(here, prereleases=True)):
            wanted = f"{requirement.name}{requirement.specifier}"
            state = f"{here} is installed" if here else "it is not installed"
            found[requirement] = f"{wanted} is needed, {state}"
    return found


def installed(name: str) -> str | None:
    """Version of a distribution; None: it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
