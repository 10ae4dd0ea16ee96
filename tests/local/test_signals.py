"""What crosses from the owner thread to event loops."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asyncmodels.local.signals import Outbox


@pytest.mark.parametrize("last", [False, True])
async def test_calls_come_before_ends_and_all_of_them(last: bool) -> None:
    """Several flushes make one line of ends, behind their calls and in order; ``last`` leaves nothing for later."""
    loop, outbox = asyncio.get_running_loop(), Outbox()
    made: list[Any] = []
    for bundle in range(3):
        for number in range(5):
            outbox.post_end(loop, made.append, ("end", bundle, number))
        outbox.post(loop, made.append, ("call", bundle))
        outbox.flush(last=last and bundle == 2)
    await asyncio.sleep(0)
    assert [entry for entry in made if entry[0] == "call"] == [("call", bundle) for bundle in range(3)]
    assert (len(made) == 18) is last
    for _ in range(4):
        await asyncio.sleep(0)
    assert [entry for entry in made if entry[0] == "end"] == [("end", b, n) for b in range(3) for n in range(5)]


@pytest.mark.parametrize("last", [False, True])
async def test_an_end_that_raises_keeps_no_other_waiting(last: bool) -> None:
    """The loop is told of the error, and the others are told what they wait for."""
    loop, outbox = asyncio.get_running_loop(), Outbox()
    errors: list[Any] = []
    loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
    made: list[int] = []
    outbox.post_end(loop, [].pop)
    for number in range(10):
        outbox.post_end(loop, made.append, number)
    outbox.flush(last=last)
    for _ in range(5):
        await asyncio.sleep(0)
    assert made == [*range(10)]
    assert [type(error) for error in errors] == [IndexError]
