"""A run on a terminal, drawn by rich: it looks good at any width, and what is printed meanwhile goes above it."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.live import Live
from rich.text import Text

from asyncmodels.batch.progress import Display, View, described, share_done

__all__ = ["RichBar"]

_WIDTH = 40


class RichBar(Display):
    """A bar, and two lines below. rich's own widgets, and its thread, would cost a run several percent of a core."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        # What goes to a pipe must not end on the terminal.
        self._live = Live(
            console=self._console, auto_refresh=False, redirect_stdout=sys.stdout.isatty(), redirect_stderr=True
        )

    def show(self, view: View, /) -> None:
        if not self._live.is_started:
            self._live.start()
        self._live.update(_drawn(view), refresh=True)

    def close(self) -> None:
        Display.on_terminal = False
        self._live.stop()  # what was shown last stays


def _drawn(view: View) -> Text:
    first, *rest = described(view)
    share = share_done(view)
    text = Text(no_wrap=False)
    if share is not None:
        full = round(_WIDTH * share)
        text.append("━" * full, "green" if share == 1 else "cyan")
        text.append("━" * (_WIDTH - full), "bright_black")
        text.append("  ")
    text.append(first, "bold")
    for words in rest:
        text.append("  ")
        text.append(
            words.replace(" ", "\N{NO-BREAK SPACE}"),
            "red" if words.endswith("failed") or words.startswith("429s") else "",
        )
    return text
