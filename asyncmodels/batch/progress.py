"""How a run is shown: a bar on a terminal, a widget in a notebook, lines in a log, a caller's function."""

from __future__ import annotations

import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TextIO, TypeAlias

from asyncmodels.batch.tally import RunStatistics
from asyncmodels.errors import ConfigurationError

__all__ = ["Display", "ProgressChoice", "View", "chosen", "described", "share_done"]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A run at one moment. Rates are of the last minute; None is what is not known."""

    statistics: RunStatistics
    limit: int | None
    """How many calls the model's Concurrency lets in at once."""
    waiting: int
    """Calls that wait in some link of the model."""
    requests_per_minute: float
    tokens_per_minute: float
    seconds_left: float | None
    refused: int
    """Calls that the server sent away because there were too many: 429 and its like."""
    retries: int
    cost: float | None
    """What the run has cost so far, where the model has a Budget, or the price list knows it (after a minute)."""
    projected_cost: float | None
    currency: str
    ended: bool = False


ProgressChoice: TypeAlias = bool | Callable[[View], object] | None


class Display(ABC):
    """Somewhere to show a run. What ``show`` raises ends the showing, not the run."""

    every: float = 0.25
    """Seconds between two looks."""
    delay: float = 0.0
    """A run that ends before so many seconds is not shown at all."""
    on_terminal: ClassVar[bool] = False
    """Whether some display has the terminal just now."""

    @abstractmethod
    def show(self, view: View, /) -> None:
        """Shows it now. The last view says that the run has ended."""

    def close(self) -> None:  # noqa: B027  # most hold nothing
        """Lets go of whatever it holds, also where it was never asked to show anything, or failed."""


def chosen(progress: ProgressChoice) -> Callable[[], Display | None] | None:
    """What makes the display of a run when it begins; None for no display. Raises ConfigurationError.

    None shows a run where somebody looks: in a notebook, on a terminal (standard error), and as a line every 30 seconds
    where the environment variable CI is set, in each case only if it takes long enough to be worth it. True shows it
    in any case, as lines where there is neither a notebook nor a terminal.
    """
    if progress is False:
        return None
    if progress is None or progress is True:
        return lambda: _found(asked=progress is True)
    if callable(progress):
        return lambda: _Told(progress)
    raise ConfigurationError(f"progress must be True, False, None or a function of a View, not {progress!r}.")


def _found(*, asked: bool) -> Display | None:
    display: Display
    if _in_notebook():
        from asyncmodels.batch.progress_notebook import Widget

        display = Widget()
    elif _is_terminal(sys.stderr):
        if Display.on_terminal:
            return None  # two of them would write over each other
        try:
            from asyncmodels.batch.progress_rich import RichBar

            display = RichBar()
        except ImportError:
            display = _Bar(sys.stderr)
        Display.on_terminal = True
    elif asked or os.environ.get("CI", "").lower() not in ("", "0", "false"):
        display = _Lines(sys.stderr)
        display.delay = 0.0 if asked else display.every
        return display
    else:
        return None
    display.delay = 0.0 if asked else 0.5
    return display


def _in_notebook() -> bool:
    """Whether IPython runs with a kernel: a plain shell of it is a terminal."""
    module = sys.modules.get("IPython")
    shell = None if module is None else module.get_ipython()
    return hasattr(shell, "kernel")


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # it was closed
        return False


# -- in words ---------------------------------------------------------------------------------------------------------


def share_done(view: View) -> float | None:
    """From 0 to 1."""
    now = view.statistics
    return None if now.total is None else min(1.0, now.done / now.total) if now.total else 1.0


def described(view: View) -> list[str]:
    """What there is to say, the most important first."""
    now = view.statistics
    share = share_done(view)
    said = [f"{now.done:,}" if now.total is None else f"{now.done:,}/{now.total:,} {share or 0:.0%}"]
    if view.ended:
        said.append(f"in {_clock(now.elapsed)}")
    elif view.seconds_left is not None:
        said.append(f"ETA {_clock(view.seconds_left)}")
    if now.failed:
        said.append(f"{now.failed:,} failed")
    if now.reused:
        said.append(f"{now.reused:,} reused")
    if not view.ended:
        limit = "" if view.limit is None else f" (limit {view.limit:,})"
        said.append(f"{now.in_flight:,} in flight{limit}")
    if now.batches:
        said.append(f"batches: {', '.join(f'{count:,} {status}' for status, count in sorted(now.batches.items()))}")
    if now.answered_there and not view.ended:
        said.append(f"{now.answered_there:,} answered there")
    said.append(f"{_short(view.requests_per_minute)} req/min")
    if now.usage.total_tokens:
        said.append(f"{_short(view.tokens_per_minute)} tok/min")
    if now.p50 is not None and now.p95 is not None:
        said.append(f"p50 {_seconds(now.p50)} p95 {_seconds(now.p95)}")
    if view.refused:
        said.append(f"429s {view.refused:,}")
    if view.retries:
        said.append(f"{view.retries:,} retries")
    if view.cost is not None:
        most = "" if view.projected_cost is None or view.ended else f" of ~{_money(view.projected_cost)}"
        said.append(f"{_money(view.cost)}{most} {view.currency}")
    return said


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(min(seconds, 1e8)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _short(number: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= unit:
            return f"{number / (unit if name != 'k' else 1e3):.1f}{name}"
    return f"{number:.0f}"


def _money(amount: float) -> str:
    return f"{amount:.2f}" if amount >= 1 else f"{amount:.4f}"


# -- without any package ----------------------------------------------------------------------------------------------


class _Told(Display):
    """A caller's own function."""

    def __init__(self, tell: Callable[[View], object]) -> None:
        self._tell = tell

    def show(self, view: View, /) -> None:
        self._tell(view)


class _Lines(Display):
    """A line now and then, for logs."""

    every = 30.0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, view: View, /) -> None:
        print("  ".join(described(view)), file=self._stream, flush=True)


class _Bar(Display):
    """One line that is written over."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, view: View, /) -> None:
        width = shutil.get_terminal_size().columns - 1
        share = share_done(view)
        bar = "" if share is None else f"[{'#' * round(20 * share):20}] "
        line = f"{bar}{'  '.join(described(view))}"[:width]
        self._stream.write(f"\r{line}\x1b[K{chr(10) if view.ended else ''}")
        self._stream.flush()

    def close(self) -> None:
        Display.on_terminal = False
