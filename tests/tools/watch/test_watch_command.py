"""`cgrpo watch` as scripts call it, and live on a terminal."""

from __future__ import annotations

import codecs
import fcntl
import json
import math
import os
import pty
import re
import select
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from logs import add, begin

from customized_grpo.cli.main import main
from customized_grpo.config import RunConfig
from customized_grpo.runs.log import RunLog

CTRL_C = "\x03"
LEAVE_SCREEN, SHOW_CURSOR = "\x1b[?1049l", "\x1b[?25h"


@pytest.fixture
def log(tiny_config: RunConfig) -> RunLog:
    log = begin(tiny_config)
    add(log, 1)
    return log


class Terminal:
    """`cgrpo watch` on a terminal of 80 columns; ``seen`` is all it has written."""

    def __init__(self, folder: Path) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "customized_grpo", "watch", str(folder), "--interval", "0.1"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
        )
        os.close(slave)
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a read may end within a letter

    def wait_for(self, pattern: str) -> None:
        while not re.search(pattern, self.seen):
            assert self._process.poll() is None, self.seen
            self._read()

    def press(self, key: str) -> None:
        os.write(self._master, key.encode())

    def code(self) -> int:
        """The code of the exit, after the rest of what is written was read."""
        while self._process.poll() is None or self._read():
            self._read()
        os.close(self._master)
        return self._process.returncode

    def _read(self) -> bool:
        if not select.select([self._master], [], [], 0.05)[0]:
            return False
        try:
            read = os.read(self._master, 65536)
        except OSError:  # the other end is closed
            return False
        self.seen += self._decoder.decode(read)
        return bool(read)


def test_a_closed_output_is_no_error(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["watch", str(log.folder)]) == 0


def test_it_updates_live_and_leaves_with_ctrl_c(log: RunLog) -> None:
    terminal = Terminal(log.folder)
    terminal.wait_for("1 / 8 updates")
    add(log, 2)
    terminal.wait_for("2 / 8 updates")
    terminal.press(CTRL_C)
    assert terminal.code() == 0
    _, after = terminal.seen.split(LEAVE_SCREEN)
    assert SHOW_CURSOR in terminal.seen
    assert "2 / 8 updates" in after  # the last frame stays on the screen
    assert "Traceback" not in terminal.seen


def test_it_waits_for_a_run_and_ends_with_it(tiny_config: RunConfig) -> None:
    terminal = Terminal(Path(tiny_config.output_dir, tiny_config.name))
    terminal.wait_for("has not begun")
    log = begin(tiny_config)
    terminal.wait_for("no update yet")
    add(log, 1)
    terminal.wait_for("1 / 8 updates")
    log.finish(8)
    assert terminal.code() == 0
    assert "after update 1" in terminal.seen.split(LEAVE_SCREEN)[1]


def test_one_frame_where_there_is_no_terminal(log: RunLog, capsys) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in log.folder.rglob("*")}
    for arguments in ([], ["--once"], ["--interval", "5"]):
        assert main(["watch", str(log.folder), *arguments]) == 0
        out = capsys.readouterr().out
        assert "1 / 8 updates" in out
        assert "\x1b" not in out
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in log.folder.rglob("*")} == before


def test_json_is_one_strict_object(log: RunLog, capsys) -> None:
    add(log, 2, **{"validation/clip-text": math.nan})
    assert main(["watch", str(log.folder), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    facts = json.loads(out, parse_constant=pytest.fail)
    assert (facts["state"], facts["update"], facts["num_updates"]) == ("running", 2, 8)
    assert facts["rewards"][0]["objective"] == "identity"
    assert facts["validation"]["clip-text"] == {"last": None, "base": None}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--interval", "0"], "--interval: must be seconds from 0.1 to 3600, got '0'"),
        (["--interval", "soon"], "got 'soon'"),
        (["--interval", "5", "--once"], "--interval has no effect with --once; leave it out"),
        (["--interval", "5", "--json"], "--interval has no effect with --json; leave it out"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, capsys, arguments: list, expected: str) -> None:
    assert main(["watch", str(tmp_path), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert expected in err


def test_nothing_heavy_is_imported(log: RunLog) -> None:
    code = (
        "import sys; from customized_grpo.cli.main import main; "
        f"assert main(['watch', {str(log.folder)!r}, '--once']) == 0; "
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
