"""An entry of a cache: an answer, what its question looked like, and both as one string of bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import blake2b

__all__ = ["Entry", "pack", "unpack"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One answer in a store. ``fingerprint`` describes its question without repeating it."""

    answer: bytes
    fingerprint: bytes
    stored_at: float
    """Seconds since 1970."""

    @property
    def size(self) -> int:
        return len(self.answer) + len(self.fingerprint) + _OVERHEAD


_OVERHEAD = 300
"""Bytes that an entry takes in memory beside its two strings: key, objects, a place in a dict."""


# -- one string of bytes, for stores outside of this process ----------------------------------------------------------

_HEAD = struct.Struct("<4s16sdI")  # the mark of this format, a digest, when it was stored, how long the fingerprint is
_MARK = b"amc1"


def pack(key: bytes, entry: Entry) -> bytes:
    """``entry`` as one string that tells when it was damaged, or belongs to another key."""
    rest = entry.fingerprint + entry.answer
    head = struct.pack("<dI", entry.stored_at, len(entry.fingerprint))
    return _MARK + _digest(key, head, rest) + head + rest


def unpack(key: bytes, packed: bytes) -> Entry | None:
    """The entry; None for what ``pack`` did not write for this key."""
    if len(packed) < _HEAD.size:
        return None
    mark, digest, stored_at, length = _HEAD.unpack_from(packed)
    rest = packed[_HEAD.size :]
    if mark != _MARK or length > len(rest) or digest != _digest(key, packed[20 : _HEAD.size], rest):
        return None
    return Entry(rest[length:], rest[:length], stored_at)


def _digest(key: bytes, head: bytes, rest: bytes) -> bytes:
    hasher = blake2b(key, digest_size=16)
    hasher.update(head)
    hasher.update(rest)
    return hasher.digest()
