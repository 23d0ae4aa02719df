"""From the log of a run to one of its sinks, beside the training."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any
from uuid import uuid4

from customized_grpo.config import RunConfig, SinkConfig
from customized_grpo.config.decoding import to_raw
from customized_grpo.files import write_atomic
from customized_grpo.run_files import SAMPLES, MetricsReader
from customized_grpo.sinks.base import RunInfo, Sink

logger = logging.getLogger("customized_grpo")

_MOST = 100_000  # entries that may wait: some hundred megabytes
_PAUSE = 60.0  # seconds until a sink that could not be opened is tried again
_LAST_WORDS = 30.0  # seconds that the end of a run waits for a sink
_SECRET = re.compile(r"(^|_)(key|token|secret|password)$", re.I)


def describe_run(config: RunConfig, folder: Path) -> RunInfo:
    """Of a run that no sink knows yet."""
    raw = _without_secrets(to_raw(config))
    return RunInfo(folder=folder, name=config.name, config=raw, id=uuid4().hex[:12], first=0)


def _without_secrets(raw: Any) -> Any:
    """Our own configs name environment variables; a stranger's plug may hold the key itself."""
    if isinstance(raw, dict):
        return {
            key: "***" if isinstance(item, str) and _SECRET.search(key) else _without_secrets(item)
            for key, item in raw.items()
        }
    return [_without_secrets(item) for item in raw] if isinstance(raw, list) else raw


def _masked(text: str) -> str:
    """Without the values of the environment variables that are called like a secret."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) > 5:
            text = text.replace(value, "***")
    return " ".join(text.split())[:300]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    update: int
    send: Callable[[Sink], None]


class Feed:
    """Inside the context, rows and pictures go to a sink on a thread; nothing here waits for it.

    What the sink fails to take is lost to it; the first failure is a warning. The last update that
    was sent is kept in ``sinks/<type>.json``: no update is sent twice, and a run that is resumed
    first sends what is in its folder and not there.
    """

    def __init__(self, config: SinkConfig, run: RunInfo) -> None:
        self._config = config
        self._file = run.folder / "sinks" / f"{config.type}.json"
        self._run, self._sent = run, -1
        self._waiting: SimpleQueue[_Entry | None] = SimpleQueue()
        self._ending = Event()
        self._failed = self._warned = False
        self._thread = Thread(target=self._work, name=f"sink {config.type}", daemon=True)

    def __enter__(self) -> Feed:
        self._attempt(self._recall)
        self._attempt(self._catch_up)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._failed = kind is not None
        self._waiting.put(None)
        self._ending.set()
        self._thread.join(_LAST_WORDS)
        if self._thread.is_alive():
            self._warn(f"not done {_LAST_WORDS:g} s after the end of the run, left alone")

    def row(self, row: dict[str, Any]) -> None:
        """A line of ``metrics.jsonl``."""
        update, values = row["update"], {n: v for n, v in row.items() if n != "update"}
        self._put(update, lambda sink: sink.metrics(update, values))

    def picture(self, update: int, file: Path) -> None:
        """A grid of sample pictures."""
        self._put(update, lambda sink: sink.picture(update, file))

    def _put(self, update: int, send: Callable[[Sink], None]) -> None:
        if self._waiting.qsize() >= _MOST:
            self._warn(f"{_MOST:,} entries behind, further ones are lost to it")
        elif update >= self._run.first:
            self._waiting.put(_Entry(update=update, send=send))

    def _recall(self) -> None:
        """What an earlier life of the run has sent."""
        if self._file.exists():
            known = json.loads(self._file.read_text(encoding="utf-8"))
            self._sent = -1 if self._config.starts_over() else known["sent"]
            self._run = replace(self._run, id=known["id"], first=self._sent + 1)

    def _catch_up(self) -> None:
        """Pictures beyond the last row are of an earlier life: they come again."""
        reader = MetricsReader(self._run.folder)
        reader.read()
        rows = {row["update"]: row for row in reader.rows}
        files = {int(p.stem): p for p in (self._run.folder / SAMPLES).glob("*.png")}
        last = max(rows, default=-1)
        for update in sorted(rows.keys() | {number for number in files if number <= last}):
            if update in rows:
                self.row(rows[update])
            if update in files:
                self.picture(update, files[update])

    def _work(self) -> None:
        sink = self._open()
        if sink is None:
            return
        while (entry := self._waiting.get()) is not None:
            self._attempt(partial(entry.send, sink))
            self._sent = entry.update
            if self._waiting.empty():
                self._attempt(self._remember)
        self._attempt(lambda: sink.close(self._failed))
        self._attempt(self._remember)

    def _open(self) -> Sink | None:
        """Tries until it works or the run ends."""
        while True:
            try:
                self._remember()  # the id, before anyone has seen it
                return self._config.build(self._run)
            except Exception as error:
                self._warn(error)
            if self._ending.wait(_PAUSE):
                return None

    def _remember(self) -> None:
        self._file.parent.mkdir(exist_ok=True)
        write_atomic(self._file, json.dumps({"id": self._run.id, "sent": self._sent}) + "\n")

    def _attempt(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception as error:
            self._warn(error)

    def _warn(self, what: Exception | str) -> None:
        if self._warned:
            return
        self._warned = True
        if isinstance(what, Exception):
            what = f"{type(what).__name__}: {_masked(str(what))}; the run goes on"
        logger.warning("sink %s: %s", self._config.type, what)
