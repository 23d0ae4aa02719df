"""Scores that were paid for are kept, in a sqlite file that threads and runs may share."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from customized_grpo.errors import ConfigError

logger = logging.getLogger("customized_grpo")

_WAIT_SECONDS = 30


def content_key(request: Mapping[str, Any]) -> str:
    """Digest of everything that an answer depends on: model, rubric, texts, pictures, options."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


class AnswerCache:
    """Scores by key. A file that fails later costs money, not the run: it is logged."""

    def __init__(self, path: str) -> None:
        """Opens or creates the file.

        Raises:
            ConfigError: if it is no sqlite file, or cannot be written.
        """
        self._lock = Lock()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=_WAIT_SECONDS, check_same_thread=False)
            with self._file:
                self._file.execute(
                    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, score REAL NOT NULL)"
                )
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"cache: must be a writable sqlite file, got {path!r}: {error}; choose another"
            ) from error

    def get(self, key: str) -> float | None:
        """The score, if it is known."""
        try:
            with self._lock:
                row = self._file.execute(
                    "SELECT score FROM answers WHERE key = ?", (key,)
                ).fetchone()
        except sqlite3.Error as error:
            logger.warning("cache of the judge: cannot be read: %s", error)
            return None
        # sqlite keeps what it is given, whatever the type of the column.
        score = None if row is None else row[0]
        return score if isinstance(score, float) and math.isfinite(score) else None

    def put(self, key: str, score: float) -> None:
        """Keeps a score; a later one for the same key replaces it."""
        try:
            with self._lock, self._file:
                self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, score))
        except sqlite3.Error as error:
            logger.warning("cache of the judge: cannot be written: %s", error)
