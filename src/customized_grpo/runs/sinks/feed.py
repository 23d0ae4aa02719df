"""From the log of a run to one of its sinks, beside the training."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any
from uuid import uuid4

from customized_grpo.config import RunConfig, SinkConfig
from customized_grpo.config.decoding import to_raw
from customized_grpo.files import write_atomic
from customized_grpo.runs.files import SAMPLES, MetricsReader
from customized_grpo.runs.sinks.base import RunInfo, Sink
from customized_grpo.runs.sinks.masking import masked, without_secrets

logger = logging.getLogger("customized_grpo")

_MOST = 100_000  # entries that may wait: some hundred megabytes
_PAUSE = 60.0  # seconds until a sink that could not be opened is tried again
_LAST_WORDS = 30.0  # seconds that the end of a run waits for its sinks


def describe_run(config: RunConfig, folder: Path) -> RunInfo:
    """Of a run that no sink knows yet."""
    raw = without_secrets(to_raw(config))
    return RunInfo(folder=folder, name=config.name, config=raw, id=uuid4().hex[:12], first=0)


@contextmanager
def feeding(sinks: Sequence[SinkConfig], run: RunInfo) -> Iterator[list[Feed]]:
    """A feed for each sink; the end waits for all of them together."""
    feeds = [Feed(sink, run) for sink in sinks]
    for feed in feeds:
        feed.start()
    failed = True
    try:
        yield feeds
        failed = False
    finally:
        for feed in feeds:
            feed.end(failed)
        deadline = time.monotonic() + _LAST_WORDS
        for feed in feeds:
            feed.wait(deadline)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    kind: str
    update: int
    send: Callable[[Sink], None]


class Feed:
    """Rows and pictures go to a sink on a thread; nothing here waits for it, but the end.

    What the sink fails to take is lost to it; the first failure is a warning. The last row and the
    last picture that were sent to each place are kept in ``sinks/<type>.json``: nothing is sent
    twice, and a run that is resumed first sends what is in its folder and not there.
    """

    def __init__(self, config: SinkConfig, run: RunInfo) -> None:
        self._config, self._run = config, run
        self._file = run.folder / "sinks" / f"{config.type}.json"
        self._place = ""
        self._places: dict[str, dict[str, int]] = {}
        self._before = {"row": -1, "picture": -1}  # updates that an earlier life has sent
        self._sent = self._before
        self._waiting: SimpleQueue[_Entry | None] = SimpleQueue()
        self._ending = Event()
        self._failed = self._warned = False
        self._thread = Thread(target=self._work, name=f"sink {config.type}", daemon=True)

    def start(self) -> None:
        """Sends what an earlier life of the run has left."""
        self._attempt(self._recall)
        self._attempt(self._catch_up)
        self._thread.start()

    def end(self, failed: bool) -> None:
        """Nothing more will come."""
        self._failed = failed
        self._waiting.put(None)
        self._ending.set()

    def wait(self, deadline: float) -> None:
        """Until everything is sent, or the clock (`time.monotonic`) says so."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"not done {_LAST_WORDS:g} s after the end of the run, left alone")

    def row(self, row: dict[str, Any]) -> None:
        """A line of ``metrics.jsonl``."""
        update, values = row["update"], {n: v for n, v in row.items() if n != "update"}
        self._put("row", update, lambda sink: sink.metrics(update, values))

    def picture(self, update: int, file: Path) -> None:
        """A grid of sample pictures."""
        self._put("picture", update, lambda sink: sink.picture(update, file))

    def _put(self, kind: str, update: int, send: Callable[[Sink], None]) -> None:
        if self._waiting.qsize() >= _MOST:
            self._warn(f"{_MOST:,} entries behind, further ones are lost to it")
        elif update > self._before[kind]:
            self._waiting.put(_Entry(kind=kind, update=update, send=send))

    def _recall(self) -> None:
        """What an earlier life of the run has sent to this place."""
        self._place = sha256(self._config.place().encode()).hexdigest()[:12]
        if not self._file.exists():
            return
        known = json.loads(self._file.read_text(encoding="utf-8"))
        places = dict(known["sent"])
        self._run, self._places = replace(self._run, id=known["id"]), places
        if self._config.starts_over() or self._place not in places:
            return
        sent = {kind: int(places[self._place][kind]) for kind in self._sent}
        if self._config.replaces():  # the last update again: its picture may be there, not noted
            last = max(sent["row"] - 1, -1)
            sent = {kind: min(update, last) for kind, update in sent.items()}
        self._before = self._sent = sent
        self._run = replace(self._run, first=sent["row"] + 1)

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
            self._sent = {**self._sent, entry.kind: entry.update}
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
        sent = {**self._places, self._place: self._sent}
        write_atomic(self._file, json.dumps({"id": self._run.id, "sent": sent}) + "\n")

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
            what = f"{type(what).__name__}: {masked(str(what))}; the run goes on"
        logger.warning("sink %s: %s", self._config.type, what)
