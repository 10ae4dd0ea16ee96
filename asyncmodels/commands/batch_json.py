"""Rows as JSON that every reader takes, whatever is in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["as_json", "json_text"]


def as_json(row: Mapping[str, Any]) -> bytes:
    """As one line."""
    try:
        return json_text(row).encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # half of a character, which only an escape can hold
        return json_text(row, ascii=True).encode("ascii") + b"\n"


def json_text(value: Any, *, ascii: bool = False) -> str:
    try:
        return json.dumps(value, ensure_ascii=ascii, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=ascii, default=str)


def _finite(value: Any) -> Any:
    """Without infinities, such as the log-probability of what cannot be, for which JSON has no word."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
