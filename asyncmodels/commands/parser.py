"""A parser of command lines that says what a mistyped option, command or choice may have meant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As ever, except that nothing is left over: a command knows its own options, and who called it does not."""
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}{self._meant_by(left)}")
        return found, left

    def _meant_by(self, left: Sequence[str]) -> str:
        options = {name.lstrip("-"): name for name in self._option_string_actions if name.startswith("--")}
        typed = [text.partition("=")[0].lstrip("-").replace("_", "-") for text in left if text.startswith("-")]
        meant = [options[close] for name in typed if (close := _closest(name, options)) is not None]
        return f" (did you mean {', '.join(meant)}?)" if meant else ""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            close = _closest(str(value), map(str, action.choices or ()))
            if close is not None:
                error.message += f"; did you mean {close!r}?"
            raise


def _closest(name: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(name, list(known), n=1)
    return close[0] if close else None
