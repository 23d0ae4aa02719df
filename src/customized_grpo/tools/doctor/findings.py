"""What a check says, and how that is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str  # what, or the field of the config
    status: Status  # problem = the run would stop or not begin; warning = worth a look
    found: str
    fix: str = ""  # '' where nothing has to be done


def ok(check: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(check=check, status="ok", found=found)


def warning(check: str, found: str, fix: str) -> Finding:
    """Worth a look."""
    return Finding(check=check, status="warning", found=found, fix=fix)


def problem(check: str, found: str, fix: str) -> Finding:
    """The run would stop or not begin."""
    return Finding(check=check, status="problem", found=found, fix=fix)


def from_error(check: str, error: Exception, fix: str = "correct it") -> Finding:
    """A problem in the words of an error: this package's end with the fix, after a semicolon."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.removeprefix(
        f"{check.rpartition('.')[2]}: "
    )  # which a plug says, as the check does
    found, _, own_fix = text.rpartition("; ")
    return problem(check, found, own_fix) if found else problem(check, text, fix)


def gigabytes(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 or not size else f"{size / 1e6:.1f} MB"


def line(finding: Finding) -> str:
    """A finding for people."""
    fix = f" -> {finding.fix}" if finding.fix else ""
    return f"{finding.status:<7} {finding.check}: {finding.found}{fix}"


def summary(findings: Iterable[Finding]) -> str:
    """How many there are of each kind."""
    count = Counter(finding.status for finding in findings)
    counts = [f"{count[word]} {word}{'s' * (count[word] != 1)}" for word in ("problem", "warning")]
    return f"{', '.join(counts)}, {count['ok']} ok"
