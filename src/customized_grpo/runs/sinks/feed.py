"""From the folder of a run to its sinks, beside the training, which does not know them.

A feed follows ``metrics.jsonl`` and the sample pictures as they are written, as `cgrpo watch` does.
So a run that is resumed, or gets a sink later, catches up by the same way.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Event, Thread
from uuid import uuid4

from customized_grpo.config import RunConfig, SinkConfig
from customized_grpo.config.decoding import to_raw
from customized_grpo.files import write_atomic
from customized_grpo.runs.files import SAMPLES, MetricsReader
from customized_grpo.runs.sinks.base import RunInfo, Sink
from customized_grpo.runs.sinks.masking import masked, without_secrets

logger = logging.getLogger("customized_grpo")

_POLL = 1.0  # seconds between two looks into the folder
_PAUSE = 60.0  # seconds until a sink that could not be opened is tried again
_LAST_WORDS = 30.0  # seconds that the end of a run waits for its sinks


def describe_run(config: RunConfig, folder: Path) -> RunInfo:
    """What a sink is told of a run that no sink knows yet."""
    raw = without_secrets(to_raw(config))
    return RunInfo(folder=folder, name=config.name, config=raw, id=uuid4().hex[:12], first=0)


@contextmanager
def feeding(sinks: Sequence[SinkConfig], config: RunConfig, folder: Path) -> Iterator[None]:
    """Inside, the sinks get what comes into the run's folder, and first what they have missed.

    The end waits for all of them together.
    """
    run = describe_run(config, folder)
    feeds = [Feed(sink, run) for sink in sinks]
    for feed in feeds:
        feed.start()
    failed = True
    try:
        yield
        failed = False
    finally:
        for feed in feeds:
            feed.end(failed)
        deadline = time.monotonic() + _LAST_WORDS
        for feed in feeds:
            feed.wait(deadline)


class Feed:
    """Sends rows and pictures to one sink, on a thread; nothing waits for it but the end.

    What the sink fails to take is lost to it; the first failure is a warning. The last row and the
    last picture that were sent to each place are kept in ``sinks/<type>.json``, so that nothing is
    sent twice.
    """

    def __init__(self, config: SinkConfig, run: RunInfo) -> None:
        self._config, self._run = config, run
        self._file = run.folder / "sinks" / f"{config.type}.json"
        self._place = ""
        self._places: dict[str, dict[str, int]] = {}
        self._sent = {"row": -1, "picture": -1}  # the last updates
        self._reader = MetricsReader(run.folder)
        self._ending = Event()
        self._failed = self._warned = False
        self._thread = Thread(target=self._work, name=f"sink {config.type}", daemon=True)

    def start(self) -> None:
        """Begins to follow the folder."""
        self._attempt(self._recall)
        self._thread.start()

    def end(self, failed: bool) -> None:
        """Says that nothing more will come."""
        self._failed = failed
        self._ending.set()

    def wait(self, deadline: float) -> None:
        """Waits until everything is sent, or until the clock (`time.monotonic`) says so."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"not done {_LAST_WORDS:g} s after the end of the run, left alone")

    def _recall(self) -> None:
        """Reads what an earlier life of the run has sent to this place."""
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
        self._sent = sent
        self._run = replace(self._run, first=sent["row"] + 1)

    def _work(self) -> None:
        sink = self._open()
        if sink is None:
            return
        is_over = False
        while not is_over:  # once more after the end: what came until then
            is_over = self._ending.wait(_POLL)
            self._attempt(partial(self._send_new, sink))
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

    def _send_new(self, sink: Sink) -> None:
        """Sends what has come, by update: its row, then its picture."""
        self._reader.read()
        rows, news = self._reader.rows, []
        for row in rows:
            if (update := row["update"]) > self._sent["row"]:
                values = {name: value for name, value in row.items() if name != "update"}
                news.append((update, "row", partial(sink.metrics, update, values)))
        # A picture is written after the row of its update; the base's may have none.
        last = rows[-1]["update"] if rows else 0
        files = [
            file for file in (self._run.folder / SAMPLES).glob("*.png") if file.stem.isdecimal()
        ]
        for file in files:
            if self._sent["picture"] < (update := int(file.stem)) <= last:
                news.append((update, "picture", partial(sink.picture, update, file)))
        for update, kind, send in sorted(news, key=lambda entry: (entry[0], entry[1] == "picture")):
            self._attempt(send)
            self._sent = {**self._sent, kind: update}
        if news:
            self._remember()

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
