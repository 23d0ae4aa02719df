"""Packages: by metadata of distributions that are really there, on sys.path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from customized_grpo.tools.doctor.findings import Finding
from customized_grpo.tools.doctor.packages import packages


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a distribution `made-up` with these metadata, and looks at it."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def look(*lines: str) -> dict[str, Finding]:
        folder = tmp_path / "made_up-1.0.dist-info"
        folder.mkdir(exist_ok=True)
        head = ("Metadata-Version: 2.4", "Name: made-up", "Version: 1.0")
        (folder / "METADATA").write_text("\n".join((*head, *lines)) + "\n")
        return {finding.check: finding for finding in packages("made-up")}

    return look


def test_what_is_installed_here_is_right() -> None:
    found = {finding.check: finding for finding in packages()}
    assert found["python"].status == found["packages"].status == "ok"
    for name in ("customized-grpo", "torch", "diffusers", "transformers", "peft"):
        assert f"{name} " in found["packages"].found
    assert "dev" not in found["extras"].found


def test_packages_and_python_that_are_missing_or_too_old(made) -> None:
    wanted = [f"Requires-Dist: {name}" for name in ("torch>=99", "no-such-thing>=1", "rich")]
    found = made("Requires-Python: >=4.0", *wanted)
    assert found["python"].status == "problem"
    assert ">=4.0 is needed" in found["python"].found
    assert "Python >=4.0" in found["python"].fix
    assert found["package torch"].status == "problem"
    assert "torch>=99 is needed, 2." in found["package torch"].found
    assert found["package torch"].fix == "pip install 'torch>=99'"
    assert "it is not installed" in found["package no-such-thing"].found
    assert "packages" not in found


def test_extras_are_read_from_the_metadata(made) -> None:
    found = made(
        "Provides-Extra: report",
        "Requires-Dist: rich>=99; extra == 'report'",
        "Requires-Dist: no-such-thing>=1; extra == 'report'",
        "Provides-Extra: lacking",
        "Requires-Dist: no-such-thing>=1; extra == 'lacking'",
        "Provides-Extra: serve",
        "Requires-Dist: rich>=1; extra == 'serve'",
        "Provides-Extra: dev",
        "Requires-Dist: other-thing; extra == 'dev'",
        "Provides-Extra: elsewhere",
        "Requires-Dist: other-thing; sys_platform == 'nowhere' and extra == 'elsewhere'",
    )
    report = found["extra report"]
    assert report.status == "warning"
    assert report.found.startswith("rich>=99 is needed, 15")
    assert report.fix == "pip install 'made-up[report]'"
    there = "there are elsewhere, serve; not installed: lacking, report"
    assert (found["extras"].status, found["extras"].found) == ("ok", there)
    assert not {"extra dev", "extra lacking"} & set(found)  # a plug that needs one says so
