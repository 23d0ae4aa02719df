"""Findings for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.markup import escape
from rich.table import Table

from customized_grpo.tools.doctor.findings import Finding

_COLORS = {"ok": "green", "warning": "yellow", "problem": "red"}


def table(findings: Sequence[Finding]) -> Table:
    """For a terminal."""
    made = Table("")
    for name in ("check", "found", "fix"):
        made.add_column(name, overflow="fold")  # paths and flags are to be copied whole
    for finding in findings:
        color = _COLORS[finding.status]
        cells = (finding.check, finding.found, finding.fix)
        made.add_row(f"[{color}]{finding.status}[/]", *map(escape, cells))
    return made


def line(finding: Finding) -> str:
    """One finding, where there is no terminal."""
    fix = f" -> {finding.fix}" if finding.fix else ""
    return f"{finding.status:<7} {finding.check}: {finding.found}{fix}"


def summary(findings: Sequence[Finding]) -> str:
    """How many there are of each kind."""
    counts = {status: sum(f.status == status for f in findings) for status in _COLORS}
    problems, warnings = counts["problem"], counts["warning"]
    return f"{_number(problems, 'problem')}, {_number(warnings, 'warning')}, {counts['ok']} ok"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def as_json(findings: Sequence[Finding]) -> str:
    """A list of {check, status, found, fix}."""
    return json.dumps([asdict(finding) for finding in findings], indent=1)
