"""What the owner thread is told: commands that any thread puts in, and that it reads between two steps."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from asyncmodels.local.job import Job
from asyncmodels.local.sequence import Sequence

__all__ = ["Cancel", "Close", "Command", "Inbox"]

_TOGETHER = 0.05
"""Seconds for which an engine that has nothing to do waits at most for requests that are on their way as well."""


@dataclass(frozen=True, slots=True, eq=False)
class Cancel:
    """The command to forget a sequence."""

    sequence: Sequence


class Close:
    """The command to end."""


Command: TypeAlias = Job | Cancel | Close


class Inbox:
    """``on_put`` is called for each command that is put in, one call at a time."""

    def __init__(self, on_put: Callable[[], None]) -> None:
        self._on_put = on_put
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = True
        self._coming = 0

    @property
    def open(self) -> bool:
        """Whether commands are still read."""
        return self._open

    def put(self, command: Command) -> bool:
        """False when nobody reads any more."""
        with self._lock:
            if self._open:
                self._commands.put(command)
                self._on_put()
            return self._open

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """While a request is being made that will be put in."""
        with self._lock:
            self._coming += 1
        try:
            yield
        finally:
            with self._lock:
                self._coming -= 1

    def read(self, *, sleep: bool, patient: Callable[[], bool]) -> Iterator[Command]:
        """What is there. With ``sleep`` it waits for the first command.

        While the reader is ``patient``, those who are about to come are waited for a moment, too: requests that are
        made at the same time begin together then, instead of all others behind the step of the first.
        """
        over = 0.0
        while True:
            patience = None
            if self._coming and patient():
                now = time.monotonic()
                over = over or now + _TOGETHER
                patience = max(0.0, over - now)
            try:
                command = self._commands.get(sleep or bool(patience), patience)
            except queue.Empty:
                return
            sleep = False
            yield command

    def shut(self) -> list[Command]:
        """From now on nothing can be put in. Returns what nobody has read."""
        with self._lock:
            self._open = False
        unread: list[Command] = []
        while not self._commands.empty():
            unread.append(self._commands.get())
        return unread
