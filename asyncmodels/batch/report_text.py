"""Numbers and texts as a report shows them."""

from __future__ import annotations

import html
import math
from datetime import UTC, datetime

__all__ = ["clock_time", "duration", "escaped", "money", "rounded", "share", "whole"]

_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


def escaped(text: object) -> str:
    """As text of a page or the value of an attribute. What no page can hold is shown as the sign for that."""
    said = str(text).encode("utf-8", "replace").decode("utf-8")
    return html.escape("".join("\ufffd" if character in _CONTROLS else character for character in said))


_CONTROLS = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))} - set("\t\n\r")


def whole(number: float) -> str:
    return f"{number:,.0f}"


def rounded(number: float) -> str:
    """In few characters: 0.042, 7.3, 481, 12.4k, 3.1M."""
    for above, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * above:
            return f"{number / above:.3g}{unit}" if number < 999.5 * above else whole(number)
    if number == int(number) or abs(number) >= 100:
        return whole(number)
    return f"{number:.2g}" if abs(number) < 10 else f"{number:.1f}"


def duration(seconds: float | None) -> str:
    """62 ms, 1.24 s, 3 m 20 s, 2 h 5 m, 3 d 4 h."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    if seconds < 1e-3:
        return "0" if seconds <= 0 else f"{seconds * 1e6:.0f} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    whole_seconds = round(seconds)
    for unit, name, below, small in ((_DAY, "d", _HOUR, "h"), (_HOUR, "h", _MINUTE, "m"), (_MINUTE, "m", 1, "s")):
        if whole_seconds >= unit:
            rest = whole_seconds % unit // below
            return f"{whole_seconds // unit} {name}{f' {rest} {small}' if rest else ''}"
    return f"{whole_seconds} s"


def share(part: float, of: float) -> str:
    """12 %, 0.31 %; what is more than nothing is never shown as nothing."""
    if not of or not part:
        return "0 %"
    percent = 100 * part / of
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def money(amount: float, currency: str) -> str:
    digits = 2 if amount >= 100 or not amount else max(2, 2 - math.floor(math.log10(amount)))
    sign = "$" if currency == "USD" else f"{currency} "
    return f"{sign}{amount:,.{min(digits, 10)}f}"


def clock_time(at: float) -> str:
    """In UTC, to the second."""
    try:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return "?"
