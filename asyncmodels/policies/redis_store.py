"""A cache on a Redis server, for the processes of many machines."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import RedisError
from redis.retry import Retry

from asyncmodels.errors import ConfigurationError
from asyncmodels.policies.cache_store import StoreError
from asyncmodels.policies.cached_answer import Entry, pack, unpack
from asyncmodels.policies.threaded_store import ThreadedStore

__all__ = ["RedisStatistics", "RedisStore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisStatistics:
    """``pending`` entries are not on the server yet, ``failed`` ones could not be sent."""

    pending: int
    written: int
    failed: int


class RedisStore(ThreadedStore):
    """Keeps entries on the Redis server at ``url``, such as ``redis://:password@host:6379/0`` or ``unix://...``.

    ``expire`` is after how many seconds the server drops an entry; None leaves that to its own ``maxmemory-policy``.
    ``prefix`` begins the names of the entries. A server that is silent for ``timeout`` seconds has failed.

    All work with the server is done by two threads of the store, each with one connection, that send together what was
    asked at a time. An entry is found by this process as soon as it was put, and by others a moment later; ``flush``,
    ``aclose`` and the end of the program wait for that. What is on the server are answers, and digests of questions, no
    prompts.
    """

    def __init__(
        self, url: str, *, expire: float | None = None, prefix: str = "asyncmodels:cache:", timeout: float = 5.0
    ) -> None:
        if expire is not None and not expire > 0:
            raise ConfigurationError(f"expire is a number of seconds above 0, or None, not {expire!r}.")
        try:
            parts: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]  # redis left it without types
        except (ValueError, TypeError, AttributeError):
            parts = {}
        if not parts:
            # Never the url itself, in which a password may be.
            raise ConfigurationError("The url of a RedisStore is one such as 'redis://localhost:6379/0'.") from None
        place = str(parts.get("path") or f"{parts.get('host', 'localhost')}:{parts.get('port', 6379)}")
        milliseconds = None if expire is None else max(1, round(expire * 1000))
        build = partial(_Server, place, _Secret(url), prefix.encode(), milliseconds, timeout)
        super().__init__(f"Redis {place}", build, max_bytes=sys.maxsize)
        self._place = place

    def statistics(self) -> RedisStatistics:
        pending = self._pending
        return RedisStatistics(pending=len(pending), written=pending.written, failed=pending.failed)

    def __repr__(self) -> str:
        return f"<RedisStore {self._place}{' (closed)' if self._closed else ''}>"


class _Server:
    """One connection to the server, for one thread."""

    def __init__(self, place: str, url: _Secret, prefix: bytes, expire: int | None, timeout: float) -> None:
        self._place = place
        self._prefix = prefix
        self._expire = expire
        # Tried again once, and at once: a connection that was idle for long may have been closed.
        self._client = Redis.from_url(
            url.text, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 1)
        )

    def get(self, keys: Iterable[bytes], /) -> Mapping[bytes, tuple[Entry, bool]]:
        wanted = list(dict.fromkeys(keys))
        return {key: (entry, False) for key, entry in self._entries(wanted)}

    def write(self, entries: Mapping[bytes, Entry | None], touched: Iterable[bytes], /) -> None:
        with self._ours(), self._client.pipeline(transaction=False) as pipeline:
            for key, entry in entries.items():
                if entry is None:
                    pipeline.delete(self._prefix + key)
                else:
                    pipeline.set(self._prefix + key, pack(key, entry), px=self._expire)
            pipeline.execute()

    def evict(self, max_bytes: int, /) -> int:
        """The server sees to that itself."""
        return 0

    def recent(self, limit: int, /) -> Sequence[tuple[bytes, Entry]]:
        """Some of the entries: a server knows no order."""
        with self._ours():
            names = list(islice(self._client.scan_iter(match=_literal(self._prefix) + b"*", count=500), limit))
        return list(self._entries([name[len(self._prefix) :] for name in names]))

    def close(self) -> None:
        self._client.close()

    def _entries(self, keys: Sequence[bytes]) -> Iterator[tuple[bytes, Entry]]:
        values: Any = []
        if keys:
            with self._ours():
                # What stands there and is no string, somebody else's, is None in this answer.
                values = self._client.mget([self._prefix + key for key in keys])
        for key, packed in zip(keys, values, strict=True):
            entry = None if packed is None else unpack(key, packed)
            if entry is not None:
                yield key, entry

    @contextmanager
    def _ours(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError) as error:
            # Only the kind of error: the text may hold the address with its password.
            raise StoreError(f"The Redis server {self._place} failed: {type(error).__name__}.") from error


class _Secret:
    """A text that does not show."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return "***"


def _literal(pattern: bytes) -> bytes:
    """``pattern`` without the special meaning of its signs."""
    return b"".join(b"\\" + bytes([sign]) if sign in b"*?[]^\\" else bytes([sign]) for sign in pattern)
