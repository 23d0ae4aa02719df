"""What a judge may use and has used."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any

from customized_grpo.rewards.endpoints.http_client import PermanentFailure

_TOKENS = ("prompt_tokens", "completion_tokens")
_COUNTED = ("requests", "retries", "failures", "cache_hits", *_TOKENS)


class Ledger:
    """Counts requests, tokens and cost, for many threads; refuses what goes beyond the budget."""

    def __init__(
        self,
        max_requests: int | None,
        max_cost: float | None,
        prices: tuple[float | None, float | None],
    ) -> None:
        """``prices`` are those of a million prompt and completion tokens; None = not known."""
        self._max_requests, self._max_cost, self._prices = max_requests, max_cost, prices
        self._lock = Lock()
        self._totals: dict[str, float] = dict.fromkeys(_COUNTED, 0.0)
        if None not in prices:
            self._totals["cost"] = 0.0

    def count(self, name: str) -> None:
        """Counts one more event of a name."""
        with self._lock:
            self._totals[name] += 1

    def spend_request(self) -> None:
        """To be called before every request, retries included.

        Raises:
            PermanentFailure: if the budget is used up. Requests under way are not known to it: the
                cost can exceed its cap by theirs.
        """
        with self._lock:
            used, cost = self._totals["requests"], self._totals.get("cost", 0.0)
            if self._max_requests is not None and used >= self._max_requests:
                raise PermanentFailure(
                    f"the budget is used up: max_requests = {self._max_requests}; raise it to go on"
                )
            if self._max_cost is not None and cost >= self._max_cost:
                raise PermanentFailure(
                    f"the budget is used up: max_cost = {self._max_cost:g}, spent {cost:.4f}; "
                    "raise it to go on"
                )
            self._totals["requests"] += 1

    def book(self, usage: Any) -> None:
        """Adds an answer's `usage`.

        Raises:
            PermanentFailure: if it has none and there is a cap on the cost, which cannot be kept.
        """
        counts = usage if isinstance(usage, Mapping) else {}
        tokens = [n for name in _TOKENS if type(n := counts.get(name)) is int and n >= 0]
        if len(tokens) < len(_TOKENS):
            if self._max_cost is not None:
                raise PermanentFailure(
                    "the answer says no token usage, so max_cost cannot be kept; use max_requests"
                )
            return
        with self._lock:
            for name, number, price in zip(_TOKENS, tokens, self._prices, strict=True):
                self._totals[name] += number
                if price is not None:
                    self._totals["cost"] += number * price / 1e6

    def totals(self) -> dict[str, float]:
        """Everything counted so far."""
        with self._lock:
            return dict(self._totals)

    def restore(self, totals: Mapping[str, float]) -> None:
        """Goes on from what was counted before a break."""
        with self._lock:
            self._totals |= {name: totals[name] for name in self._totals if name in totals}
