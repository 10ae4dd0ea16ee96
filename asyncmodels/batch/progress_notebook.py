"""A run in a notebook: a piece of HTML that is replaced in place, which every kind of notebook can show."""

from __future__ import annotations

from html import escape
from typing import Any

from IPython.display import HTML, display

from asyncmodels.batch.progress import Display, View, described, share_done

__all__ = ["Widget"]


class Widget(Display):
    every = 0.5  # each look is a message to the browser, and stays in the file of some notebooks

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, view: View, /) -> None:
        html = HTML(_page(view))  # type: ignore[no-untyped-call]  # IPython tells no types
        if self._handle is None:
            self._handle = display(html, display_id=True)  # type: ignore[no-untyped-call]  # the same
        else:
            self._handle.update(html)


def _page(view: View) -> str:
    first, *rest = (escape(words) for words in described(view))
    share = share_done(view)
    bar = ""
    if share is not None:
        bar = f'<progress value="{share:.4f}" max="1" style="width:20em;vertical-align:middle"></progress> '
    return f"<div>{bar}<b>{first}</b> &ensp;{' &ensp;'.join(rest)}</div>"
