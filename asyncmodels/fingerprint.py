"""What a question looked like, without its words: enough to say in what two of them differ, and no prompt on a disk.

A fingerprint maps places such as ``messages[2].content`` to short digests; numbers, and what the backend says of
itself, are written out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any, TypeAlias

from asyncmodels.identity import canonical

__all__ = ["Fingerprint", "differences", "distance", "fingerprint", "read"]

Fingerprint: TypeAlias = Mapping[str, str]

_DEPTH = 5
"""``messages[0].content[0].text`` is a place of its own; what lies deeper is one digest."""


def fingerprint(who: Any, tree: Mapping[str, Any]) -> bytes:
    """That of the question ``tree`` to ``who``, as JSON."""
    leaves = dict(_leaves(tree, "", _DEPTH, clear=False))
    leaves.update(_leaves(who, "backend", _DEPTH, clear=True))
    return json.dumps(leaves, separators=(",", ":")).encode("ascii")


def read(written: bytes) -> Fingerprint:
    """The fingerprint that ``fingerprint`` has written; an empty one for anything else."""
    try:
        leaves = json.loads(written)
    except ValueError:
        return {}
    return leaves if isinstance(leaves, dict) else {}


def distance(one: Fingerprint, other: Fingerprint) -> int:
    """In how many places they differ."""
    return len(dict(one.items() ^ other.items()))


def differences(mine: Fingerprint, theirs: Fingerprint, holder: str = "the cache") -> tuple[str, ...]:
    """What differs, place by place, in words; ``theirs`` is what ``holder`` holds."""
    said: dict[str, None] = {}
    for place in sorted(mine.keys() | theirs.keys(), key=_order):
        here, there = mine.get(place), theirs.get(place)
        if here == there:
            continue
        if here is None or there is None:
            where = "only asked now" if there is None else f"only in {holder}"
            said[f"{_outermost(place, theirs if there is None else mine)} ({where})"] = None
        elif here.startswith("#") or there.startswith("#"):
            said[place] = None
        else:
            said[f"{place} ({here}, in {holder} {there})"] = None
    return tuple(said)


def _outermost(place: str, others: Iterable[str]) -> str:
    """The largest part that ``place`` belongs to and that the other side has nothing of: a message, not its role."""
    parts = place.replace("[", ".[").split(".")
    for length in range(1, len(parts)):
        part = ".".join(parts[:length]).replace(".[", "[")
        if not any(other == part or other.startswith((f"{part}.", f"{part}[")) for other in others):
            return part
    return place


def _order(place: str) -> tuple[tuple[str, int], ...]:
    """Messages by their number: 2 before 10."""
    return tuple(
        (name, int(number.rstrip("]")) if number else -1)
        for name, _, number in (part.partition("[") for part in place.split("."))
        if not number or number.rstrip("]").isdigit()
    )


def _leaves(value: Any, place: str, depth: int, *, clear: bool) -> Iterator[tuple[str, str]]:
    if depth and isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{place}.{name}" if place else str(name), depth - 1, clear=clear)
    elif depth and isinstance(value, list | tuple) and value:
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{place}[{index}]", depth - 1, clear=clear)
    elif value is None or isinstance(value, int | float) or (clear and isinstance(value, str)):
        yield place, json.dumps(value)
    else:
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else canonical(value)
        yield place, f"#{blake2b(data, digest_size=6).hexdigest()}"
