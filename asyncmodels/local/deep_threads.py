"""Threads with deep stacks, for compilers of grammars, which are recursive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["DeepThreads"]

T = TypeVar("T")
_STACK = 64 * 2**20
"""Bytes: several times what a grammar within our limits takes, where a thread of macOS has half a mebibyte."""


class DeepThreads:
    """A few threads; nothing but grammars waits behind a grammar that is hard to compile. ``close`` ends them."""

    def __init__(self, name: str, *, threads: int = 2) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"asyncmodels-grammar-{name}")

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Raises RuntimeError when closed."""
        with _lock:
            # The pool starts its threads in here, and the size is that of all threads that are started meanwhile.
            before = threading.stack_size(_STACK)
            try:
                return self._pool.submit(function)
            finally:
                threading.stack_size(before)

    def close(self) -> None:
        # What is under way is finished: a cancelled future would look as if its caller had been cancelled.
        self._pool.shutdown(wait=False)


_lock = threading.Lock()
