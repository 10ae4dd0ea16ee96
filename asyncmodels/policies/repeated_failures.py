"""Requests that fail in the same way each time, although nothing is wrong with the pool: a prompt that makes a server
fall over, one that always takes longer than it may.

A failure counts when the pool was well since the request's failure before it, and since the first that counted: it
answered others, and failed with at most a tenth as many of them. After so many counted failures of one kind (type,
status, code) in a row the request is given up: it is not sent for a minute, and then once, and so on until it is
answered or fails in another way. What is known of a request is a digest of it; of at most REMEMBERED requests, those
that failed last.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from hashlib import sha256
from typing import TypeAlias

from asyncmodels.errors import (
    AsyncModelsError,
    ConflictError,
    ConnectError,
    OverloadedError,
    QueueFullError,
    RateLimitError,
    RepeatedFailureError,
)
from asyncmodels.identity import canonical, question
from asyncmodels.types import Request

__all__ = ["RECHECK", "REMEMBERED", "RepeatedFailures"]

RECHECK = 60.0
"""Seconds after which a request that was given up is sent once more."""
REMEMBERED = 1000
"""Of how many requests failures are remembered."""
WELL = 0.1
"""The share of other calls that may fail in a pool that is well."""

_NOT_THE_REQUEST = (RateLimitError, OverloadedError, ConnectError, ConflictError, QueueFullError)
"""What says nothing about the request, because it was not looked at."""

Kind: TypeAlias = tuple[str, int | None, str | None]


class _Known:
    """What is known of one request that failed."""

    __slots__ = (
        "answered",
        "count",
        "failed",
        "hint",
        "kind",
        "message",
        "next_try",
        "others_answered",
        "others_failed",
    )

    def __init__(self, hint: int) -> None:
        self.hint = hint
        self.message = ""
        self.next_try = 0.0
        # The pool's counts at the last failure, and what the others did since the first one that counted.
        self.answered = 0
        self.failed = 0
        self.begin(None)

    def begin(self, kind: Kind | None) -> None:
        """A first failure of this kind."""
        self.kind = kind
        self.count = 1
        self.others_answered = 0
        self.others_failed = 0


class RepeatedFailures:
    """Knows which requests failed how often; ``limit`` counted failures are enough to give one up."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.given_up = 0
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        # A cheap sign of each known request, so that the others need not be digested.
        self._hints: Counter[int] = Counter()
        # Failures with an answer before them: those of a pool that answers nobody say nothing about anybody.
        self._failed = 0
        self._answered_at_last = -1

    def __bool__(self) -> bool:
        """Whether anything is known at all; while nothing is, nobody needs to ask."""
        return bool(self._known)

    def check(self, request: Request, now: float) -> None:
        """Raises RepeatedFailureError for a request that is not to be sent now."""
        if _hint(request) not in self._hints:
            return
        key = _key(request)
        known = None if key is None else self._known.get(key)
        if known is None or known.count < self.limit:
            return
        with self._lock:
            if now >= known.next_try:
                known.next_try = now + RECHECK  # this one finds out for the others
                return
        raise _given_up(known, "it is not sent again", retry_after=min(RECHECK, max(0.0, known.next_try - now)))

    def answered(self, request: Request) -> None:
        """The request is fine, whatever was known of it."""
        if _hint(request) not in self._hints:
            return
        key = _key(request)
        with self._lock:
            if key is not None and key in self._known:
                self._forget(key)

    def failed(self, request: Request, error: Exception, answered: int, now: float) -> RepeatedFailureError | None:
        """Counts a failure that could be retried; ``answered`` is how many calls the pool has answered up to now.

        Returns the error to be raised instead of trying again, once the request is to be given up.
        """
        nobody = answered == self._answered_at_last
        self._answered_at_last = answered
        self._failed += not nobody
        if isinstance(error, _NOT_THE_REQUEST):
            return None
        # Where nobody was answered since somebody's last failure, it is not this request that is to blame.
        if nobody and _hint(request) not in self._hints:
            return None
        key = _key(request)
        if key is None:
            return None
        with self._lock:
            known = self._remember(key, request)
            self._count(known, error, answered, now, counts=not nobody)
            if known.count < self.limit:
                return None
            return _given_up(known, "it is not tried again", retry_after=RECHECK, error=error)

    def _count(self, known: _Known, error: Exception, answered: int, now: float, *, counts: bool) -> None:
        kind = _kind(error)
        known.message = str(error)[:500]
        if kind != known.kind:
            self.given_up -= known.count >= self.limit
            known.begin(kind)
        elif known.count >= self.limit:
            known.next_try = now + RECHECK
        elif counts:
            others_answered = answered - known.answered
            others_failed = max(0, self._failed - known.failed - 1)
            known.others_answered += others_answered
            known.others_failed += others_failed
            if not _well(known.others_answered, known.others_failed):
                known.begin(kind)
            elif others_answered > 0 and _well(others_answered, others_failed):
                known.count += 1
                if known.count >= self.limit:
                    self.given_up += 1
                    known.next_try = now + RECHECK
        known.answered, known.failed = answered, self._failed

    def _remember(self, key: bytes, request: Request) -> _Known:
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= REMEMBERED:
                self._forget(next(iter(self._known)))
            known = self._known[key] = _Known(_hint(request))
            self._hints[known.hint] += 1
        else:
            self._known.move_to_end(key)
        return known

    def _forget(self, key: bytes) -> None:
        known = self._known.pop(key)
        if known.count >= self.limit:
            self.given_up -= 1
        self._hints[known.hint] -= 1
        if not self._hints[known.hint]:
            del self._hints[known.hint]


def _well(answered: int, failed: int) -> bool:
    return failed <= WELL * answered


def _given_up(known: _Known, what: str, *, retry_after: float, error: Exception | None = None) -> RepeatedFailureError:
    name, status, code = known.kind or ("", None, None)
    return RepeatedFailureError(
        f"This request failed {known.count} times in the same way while others were answered, so {what} "
        f"for {retry_after:.0f} s: {name}: {known.message}",
        status=status,
        code=code,
        retry_after=retry_after,
        request_id=getattr(error, "request_id", None),
        attempts=0 if error is None else getattr(error, "attempts", 1),
    )


def _kind(error: Exception) -> Kind:
    if isinstance(error, AsyncModelsError):
        return type(error).__name__, error.status, error.code
    return type(error).__name__, None, None


def _hint(request: Request) -> int:
    """The same for equal requests, and different for most others."""
    messages = request.messages
    content = messages[-1].content if messages else None
    return hash((len(messages), content if isinstance(content, str) else None, request.score))


def _key(request: Request) -> bytes | None:
    """A digest of what is asked; None where nobody can say whether two requests are the same."""
    try:
        return sha256(canonical(question(request))).digest()
    except (TypeError, ValueError, RecursionError):
        return None
