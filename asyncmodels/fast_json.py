"""JSON of what programs keep: as quick as orjson where it can, and as the standard library says where it cannot.

orjson writes NaN as null and refuses lone surrogates, large integers and keys that are no strings, all of which models'
answers and callers' extras may hold. What it might have changed is written, and read, by ``json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import orjson

__all__ = ["Encoder", "compact", "decode"]

_CAREFUL = b" "
"""Before what ``json`` has written: orjson would read its large integers as floats."""
_ITSELF = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS


class Encoder:
    """Writes trees of dicts and lists, closely; ``default`` turns what is none of JSON into what is.

    The same tree is always written as the same bytes, and with ``sort_keys`` in whatever order its keys came. Raises
    TypeError or ValueError for what JSON cannot hold, and RecursionError for a circle.
    """

    def __init__(self, *, default: Callable[[Any], Any], sort_keys: bool = False) -> None:
        self._default = default
        self._options = _ITSELF | (orjson.OPT_SORT_KEYS if sort_keys else 0)
        # Circles are found by their depth: looking out for them costs a fifth of the time.
        self._careful = json.JSONEncoder(
            check_circular=False, sort_keys=sort_keys, separators=(",", ":"), default=default
        )

    def encode(self, tree: Any) -> bytes:
        try:
            text = orjson.dumps(tree, default=self._default, option=self._options)
        except TypeError:
            text = b"null"
        # Behind a null there may have been a NaN or an infinity.
        return _CAREFUL + self._careful.encode(tree).encode("ascii") if b"null" in text else text


def decode(text: bytes) -> Any:
    """What an Encoder wrote. Raises ValueError for anything else."""
    return json.loads(text) if text.startswith(_CAREFUL) else orjson.loads(text)


def compact(tree: Any) -> str:
    """What was read from JSON, as the text that an Encoder writes of it."""
    return _plain.encode(tree).decode()


def _refuse(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} has no place in JSON")


_plain = Encoder(default=_refuse)
