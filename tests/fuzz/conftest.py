from __future__ import annotations

import pytest
from fuzzing import COUNTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for kind in sorted({kind for kind, _ in COUNTS}):
        accepted, refused = COUNTS[kind, "accepted"], COUNTS[kind, "refused"]
        terminalreporter.line(
            f"fuzz: {kind}: {accepted + refused} examples, {accepted} accepted, {refused} refused"
        )
