"""What is declared about the package is true."""

import os
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(r for extra in PROJECT["optional-dependencies"].values() for r in extra),
]
PINS = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.M))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(".")]


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_every_requirement_is_pinned_within_its_bound(requirement):
    match = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?(>=|==)([\d.]+)", requirement)
    assert match, requirement
    name, sign, bound = match.groups()
    pin = numbers(PINS[name])
    assert pin == numbers(bound) if sign == "==" else pin >= numbers(bound)


@pytest.mark.parametrize("name", ["accelerate", "diffusers", "peft", "torch", "transformers"])
def test_what_is_installed_is_what_is_pinned(name):
    assert version(name).split("+")[0] == PINS[name]


def test_the_installed_version_is_the_declared_one():
    assert version(PROJECT["name"]) == PROJECT["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest
    assert Version(PROJECT["version"]).base_version == newest[1]


def test_ci_runs_make_check():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make check" in script.read_text()
    assert re.search(r"^check:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE"])
def test_licences_travel_with_the_package(name):
    assert name in PROJECT["license-files"]
    assert (ROOT / name).stat().st_size > 0


def test_the_art_is_credited():
    notice = (ROOT / "NOTICE").read_text()
    assert "Twemoji" in notice
    assert "CC BY 4.0" in notice
