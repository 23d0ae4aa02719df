"""The site builds without a warning, its links lead somewhere, its reference is complete."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from helpers import ROOT

pytest.importorskip("furo", reason="needs the extra [docs]")

from customized_grpo import ops, registry
from customized_grpo.cli import main as cli
from customized_grpo.config import BenchmarkConfig, RunConfig, StudyConfig, list_fields
from customized_grpo.errors import ConfigError, Interrupted
from customized_grpo.tools.serve.config import ServeConfig

pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """Anchors, links and text of an HTML file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors.add(given.get("id", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("img", "script", "link"):
            self.loaded += [given[name] for name in ("src", "href") if name in given]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it."""
    target = tmp_path_factory.mktemp("site")
    options = ["-W", "--keep-going", "-q", "-b", "html"]
    command = [sys.executable, "-m", "sphinx", *options, str(ROOT / "docs"), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_make_docs_builds_this(site: Path) -> None:
    dry = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, check=True)
    assert "sphinx-build -W --keep-going -b html docs build/docs" in dry.stdout.decode()


def test_every_document_has_a_page(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        where = page.relative_to(ROOT / "docs")
        if where.parts[0] != "results":
            assert (site / where.with_suffix(".html")).exists()


def test_no_link_is_broken(pages: dict[Path, Page]) -> None:
    broken = defaultdict(list)
    for path, page in pages.items():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else set()
            if not target.exists() or (parts.fragment and unquote(parts.fragment) not in anchors):
                broken[path.name].append(link)
    assert not broken


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page]) -> None:
    loaded = {link for page in pages.values() for link in page.loaded}
    assert loaded
    assert not [link for link in loaded if urlsplit(link).netloc]


def test_every_command_and_argument_is_in_the_reference(
    site: Path, pages: dict[Path, Page]
) -> None:
    page = pages[site / "reference" / "cli.html"]
    (commands,) = (a.choices for a in cli._parser()._actions if isinstance(a.choices, dict))
    assert len(commands) > 10
    for name, parser in commands.items():
        assert f"cgrpo-{name}" in page.anchors
        for action in parser._actions:
            for flag in action.option_strings:
                assert flag in ("-h", "--help") or flag in page.text, (name, flag)
    assert "cgrpo resume RUN [--allow-changed]" in page.text


def test_every_field_is_in_the_reference(site: Path, pages: dict[Path, Page]) -> None:
    words = set(pages[site / "reference" / "config.html"].text.split())
    for root in (RunConfig, StudyConfig, BenchmarkConfig, ServeConfig):
        fields = {info.path for info in list_fields(root)} - {"algorithm.type"}  # of a plug, there
        missing = fields - words
        assert not missing, root
    assert {"methods.N.label", "benchmark.reference", "advantage.schedule.target"} <= words


def test_every_plug_is_in_the_reference(site: Path, pages: dict[Path, Page]) -> None:
    page = pages[site / "reference" / "plugs.html"]
    words = set(page.text.split())
    groups = (registry.DATA, registry.GENERATORS, registry.REWARDS, registry.ALGORITHMS)
    for group in groups:
        for name in registry.plug_types(group):
            assert name.replace(".", "") in page.anchors  # as GitHub makes anchors
            fields = {info.path for info in list_fields(registry.load_plug(group, name))}
            assert fields <= words, name


def test_every_function_is_in_the_reference(site: Path, pages: dict[Path, Page]) -> None:
    anchors = pages[site / "reference" / "api.html"].anchors
    assert {f"customized_grpo.ops.{name}" for name in ops.__all__} <= anchors
    assert "customized_grpo.types.Rollout.step_index" in anchors


def test_limits_are_those_that_are_checked(site: Path, pages: dict[Path, Page]) -> None:
    text = " ".join(pages[site / "reference" / "config.html"].text.split())
    assert "Samples G of one prompt, compared with each other (paper: 12). Whole number, " in text
    assert "whole number, at least 2, at most 65,536" in text.lower()


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (None, 0),
        (RuntimeError(), 1),
        (ConfigError("x"), 2),
        (KeyboardInterrupt(), 130),
        (Interrupted(signal.SIGTERM), 143),
    ],
)
def test_exit_codes_are_those_of_the_page(
    raised: BaseException | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(options: object) -> None:
        if raised is not None:
            raise raised

    monkeypatch.setattr(cli.data, "_data", command)
    if code == 1:  # Python's own code for what nobody catches
        with pytest.raises(RuntimeError):
            cli.main(["data", "x.yaml"])
    else:
        assert cli.main(["data", "x.yaml"]) == code
    table = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert f"| {code} |" in table or (code == 143 and "143 for SIGTERM" in table)


def test_every_variable_that_is_read_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    read = set()
    for file in (ROOT / "src").rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        read |= set(re.findall(r"environ(?:\.\w+\(|\[)\s*\"(\w+)\"", source))
    assert len(read) > 4
    assert read <= set(re.findall(r"`(\w+)`", page))
