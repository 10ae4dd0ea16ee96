"""Looks whether a step of an engine ends: one that does not is reported, with what the engine is doing.

Nothing is ended. A thread that hangs inside of native code cannot be, and a long step may still come to its end.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable

from asyncmodels.clock import Clock

__all__ = ["StepWatch"]

_LOG = logging.getLogger(__name__)
_LOOKS = 4
"""How often to look within the time after which a step counts as stuck."""
_FRAMES = 3
"""How many of the innermost calls are shown."""


class StepWatch:
    """Watches the steps of one owner thread, from a thread of its own, between ``start`` and ``stop``.

    A step that has lasted ``stuck_after`` seconds is reported by a warning, then again each time that has doubled.
    ``describe`` says what the engine is doing; it is called on the watching thread. None watches nothing.
    """

    def __init__(self, name: str, stuck_after: float | None, clock: Clock, describe: Callable[[], str]) -> None:
        self.stuck_after = stuck_after
        self._name = name
        self._clock = clock
        self._describe = describe
        self._since: float | None = None
        self._reported: tuple[float, float] = (0.0, 0.0)
        """Which step was reported last, by its beginning, and how long it had lasted."""
        self._watched: int | None = None
        self._over = threading.Event()

    def start(self) -> None:
        """Watches the thread that calls."""
        self._watched = threading.get_ident()
        if self.stuck_after is not None:
            threading.Thread(target=self._watch, name=f"asyncmodels-watch-{self._name}", daemon=True).start()

    def stop(self) -> None:
        self._since = None
        self._over.set()

    def began(self) -> None:
        """Says that a step begins; does nothing when one is under way."""
        if self._since is None:
            self._since = self._clock.time()

    def ended(self) -> None:
        """Says that it has ended, or brought something."""
        self._since = None

    def stuck_for(self) -> float | None:
        """How long the present step has lasted, if it is stuck. Any thread may ask."""
        since = self._since
        if since is None or self.stuck_after is None:
            return None
        age = self._clock.time() - since
        return age if age >= self.stuck_after else None

    def look(self) -> None:
        """Reports the present step if it is stuck and that is news."""
        since, age = self._since, self.stuck_for()
        if since is None or age is None:
            return
        step, last = self._reported
        if step == since and age < 2 * last:
            return
        self._reported = (since, age)
        _LOG.warning(
            "The engine of %s has been in one step for %.0f s: %s; it is in %s.",
            self._name,
            age,
            self._describe(),
            self._place(),
        )

    def _watch(self) -> None:
        assert self.stuck_after is not None  # noqa: S101  # else nobody starts it
        while not self._over.wait(self.stuck_after / _LOOKS):
            self.look()

    def _place(self) -> str:
        frame = None if self._watched is None else sys._current_frames().get(self._watched)
        calls = traceback.extract_stack(frame)[-_FRAMES:] if frame is not None else []
        shown = (f"{call.name} ({call.filename.rpartition('/')[2]}:{call.lineno})" for call in reversed(calls))
        return ", called by ".join(shown) or "no Python code"
