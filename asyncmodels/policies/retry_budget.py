"""How many retries a pool can bear: Finagle's retry budget (``RetryBudget`` of twitter/finagle; gRPC's proposal A6
throttles alike). Each call deposits a fraction of a token, each retry takes a whole one."""

from __future__ import annotations

import threading

from asyncmodels.errors import ConfigurationError

__all__ = ["RetryBudget"]

AHEAD = 10.0
"""Seconds. So long after many calls have stopped the refill by time begins at the latest."""


class RetryBudget:
    """Keeps retries from becoming a storm: at most ``ratio`` of the calls in the long run, plus a reserve.

    The reserve holds at most ``reserve`` retries, is full at first, and refills by ``ratio`` of a retry with each call,
    or by ``per_second`` with time where that is more, so that a program that makes few calls can still retry. One
    budget may be shared by several policies, from any thread.
    """

    def __init__(self, *, ratio: float = 0.1, reserve: float = 100.0, per_second: float = 1.0) -> None:
        for name, number in (("ratio", ratio), ("reserve", reserve), ("per_second", per_second)):
            if isinstance(number, bool) or not isinstance(number, int | float) or not number >= 0:
                raise ConfigurationError(f"The {name} of a RetryBudget is a number of at least 0, not {number!r}.")
        self.ratio = ratio
        self.reserve = reserve
        self.per_second = per_second
        self._lock = threading.Lock()
        self._tokens = float(reserve)
        self._deposits = 0
        self._settled_at: float | None = None
        # What time has given beyond the calls, never above zero: by how much the calls are ahead.
        self._behind = 0.0

    def deposit(self, calls: int = 1) -> None:
        """Counts calls; what they are worth is reckoned when somebody wants a retry."""
        self._deposits += calls

    def withdraw(self, now: float) -> bool:
        """Takes one retry out, at ``now`` on the policy's clock; False when there is none."""
        with self._lock:
            self._settle(now)
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True

    def left(self, now: float) -> float:
        """How many retries could be made at ``now``."""
        with self._lock:
            self._settle(now)
            return self._tokens

    def _settle(self, now: float) -> None:
        deposits, self._deposits = self._deposits, 0
        elapsed = 0.0 if self._settled_at is None else max(0.0, now - self._settled_at)
        self._settled_at = now if self._settled_at is None else max(now, self._settled_at)
        earned = deposits * self.ratio
        behind = self._behind + elapsed * self.per_second - earned
        self._tokens = min(self.reserve, self._tokens + earned + max(0.0, behind))
        self._behind = max(min(0.0, behind), -AHEAD * self.per_second)

    def __repr__(self) -> str:
        return f"RetryBudget(ratio={self.ratio:g}, reserve={self.reserve:g}, per_second={self.per_second:g})"
