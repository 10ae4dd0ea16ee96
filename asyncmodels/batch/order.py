"""In which order inputs are asked, where that is free: a local engine is faster when alike goes with alike.

The order is made within a window that slides over the input, so that memory stays bounded at any length.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal, TypeAlias

from asyncmodels.batch.item import Entry
from asyncmodels.types import Message

__all__ = ["WINDOW", "Entries", "Schedule", "groups", "limited", "scheduled", "shuffled"]

Entries: TypeAlias = AsyncGenerator[Entry, None]

Schedule: TypeAlias = Literal["input", "longest", "prefix"]
"""As they come; the longest prompts first, so that no long one is left for the end; or those that begin alike together,
the longest first, so that an engine computes what they share once."""

WINDOW = 4096
"""How many inputs are looked at together."""


async def limited(entries: Entries, limit: int) -> Entries:
    """The first ``limit`` of them; what comes after is not read."""
    left = limit
    async with aclosing(entries):
        while left > 0 and (entry := await anext(entries, None)) is not None:
            yield entry
            left -= 1


async def scheduled(entries: Entries, schedule: Schedule, window: int = WINDOW) -> Entries:
    async with aclosing(groups(entries, window)) as chunks:
        async for chunk in chunks:
            chunk.sort(key=_sizes if schedule == "longest" else _beginnings)
            for entry in chunk:
                yield entry


async def shuffled(entries: Entries, seed: int, window: int = 16 * WINDOW) -> Entries:
    """In a random order that the seed decides: of the whole input up to ``window`` entries, and beyond that as of a
    buffer of so many, from which a random one is taken whenever the next comes in."""
    chance = random.Random(seed)  # an order, not a secret
    buffer: list[Entry] = []
    async with aclosing(entries):
        async for entry in entries:
            if len(buffer) < window:
                buffer.append(entry)
                continue
            place = chance.randrange(window)
            yield buffer[place]
            buffer[place] = entry
    chance.shuffle(buffer)
    for entry in buffer:
        yield entry


def _sizes(entry: Entry) -> tuple[int, int]:
    return -_length(_messages(entry)), entry.index


def _beginnings(entry: Entry) -> tuple[str, int, int]:
    """By all but the last message, which is what conversations share, and then the longest first."""
    *shared, _ = _messages(entry) or (None,)
    beginning = "\0".join(f"{message.role}\0{message.text}" for message in shared if message is not None)
    return beginning, -_length(_messages(entry)), entry.index


def _messages(entry: Entry) -> tuple[Message, ...]:
    return () if entry.request is None else entry.request.messages


def _length(messages: tuple[Message, ...]) -> int:
    return sum(len(message.text) for message in messages)


async def groups(entries: Entries, size: int) -> AsyncGenerator[list[Entry], None]:
    """``size`` of them at a time, the last ones fewer."""
    chunk: list[Entry] = []
    async with aclosing(entries):
        async for entry in entries:
            chunk.append(entry)
            if len(chunk) == size:
                yield chunk
                chunk = []
    if chunk:
        yield chunk
