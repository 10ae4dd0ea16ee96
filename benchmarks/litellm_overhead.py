"""What asyncmodels adds to ``litellm.acompletion``: CPU per call with the same arguments against the same server.

    python benchmarks/litellm_overhead.py
    python benchmarks/litellm_overhead.py --rounds 9 --pairs 300

``direct`` is ``litellm.acompletion`` with ``num_retries=0, max_retries=0`` over an aiohttp session as aiohttp makes it;
``asyncmodels`` is ``LiteLLMModel.generate``, or ``.stream``, with its default policies. Both send the same messages and
read a stream to its end, and each has a client of its own in litellm's cache, over one warm connection.

A call of litellm's takes many times what is looked for, so that only differences of neighbours mean anything: both
sides run in one process, one call each to a pair, first one side and then the other, and what is shown is the mean of
the pairs' differences without the fifth at either end. Before each call litellm is given time to finish what it goes on
with after an answer, and no garbage is collected while one is measured. Behind each figure is the 95% interval that a
bootstrap over the pairs gives.

CPU is that of the process, threads included, from the call until litellm is done with it; ``loop`` is that of the event
loop's thread alone, and ``wall`` the time until the answer is there. The server answers at once.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

from asyncmodels import LiteLLMModel  # found by the line above
from asyncmodels.remote.litellm_call import DEFAULT_TIMEOUT
from asyncmodels.remote.litellm_session import litellm
from benchmarks.overhead import MESSAGES
from benchmarks.server import running

Call = Callable[[], Awaitable[None]]
Spent = dict[str, dict[str, list[float]]]
"""By measure and side, in milliseconds, in the order of the pairs."""

MEASURES = ("cpu", "loop", "wall")
SIDES = ("direct", "asyncmodels")
CHUNKS = 50
_REST = 0.006
_WARM_UP = 30
_TRIMMED = 0.2
_RESAMPLES = 2000


async def measure(model: LiteLLMModel, url: str, *, stream: bool, rounds: int, pairs: int) -> Spent:
    # As ours is, except for what watches it.
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0), cookie_jar=aiohttp.DummyCookieJar()
    )
    calls = dict(zip(SIDES, (_direct(session, url, stream=stream), _ours(model, stream=stream)), strict=True))
    spent: Spent = {measured: {side: [] for side in SIDES} for measured in MEASURES}
    for call in calls.values():
        for _ in range(_WARM_UP):
            await call()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for number in range(rounds * pairs):
            if number % pairs == 0:
                gc.collect()
            order = SIDES if number % 2 else SIDES[::-1]
            for side in order:
                await asyncio.sleep(_REST)
                found = await _timed(calls[side])
                for measured, milliseconds in zip(MEASURES, found, strict=True):
                    spent[measured][side].append(milliseconds)
    finally:
        gc.enable()
        await session.close()
    return spent


async def _timed(call: Call) -> tuple[float, float, float]:
    cpu, loop, wall = time.process_time_ns(), time.thread_time_ns(), time.perf_counter_ns()
    await call()
    arrived = time.perf_counter_ns()
    await asyncio.sleep(_REST)
    return (
        (time.process_time_ns() - cpu) / 1e6,
        (time.thread_time_ns() - loop) / 1e6,
        (arrived - wall) / 1e6,
    )


def _direct(session: aiohttp.ClientSession, url: str, *, stream: bool) -> Call:
    arguments: dict[str, Any] = {
        "model": "openai/benchmark",
        "max_tokens": 64,
        "api_base": url,
        "api_key": "direct",
        "timeout": DEFAULT_TIMEOUT,
        "num_retries": 0,
        "max_retries": 0,
        "shared_session": session,
    }

    async def generate() -> None:
        answer: Any = await litellm.acompletion(messages=[dict(message) for message in MESSAGES], **arguments)
        assert answer.choices[0].message.content

    async def read() -> None:
        answer: Any = await litellm.acompletion(
            messages=[dict(message) for message in MESSAGES],
            stream=True,
            stream_options={"include_usage": True},
            **arguments,
        )
        pieces = 0
        async for chunk in answer:
            pieces += bool(chunk.choices and chunk.choices[0].delta.content)
        assert pieces == CHUNKS

    return read if stream else generate


def _ours(model: LiteLLMModel, *, stream: bool) -> Call:
    async def generate() -> None:
        response = await model.generate(MESSAGES, max_tokens=64)
        assert response.content

    async def read() -> None:
        pieces = 0
        async with model.stream(MESSAGES, max_tokens=64) as deltas:
            async for delta in deltas:
                pieces += bool(delta.content)
        assert pieces == CHUNKS

    return read if stream else generate


# -- from pairs to a figure -------------------------------------------------------------------------------------------


def _trimmed(values: Sequence[float]) -> float:
    cut = int(len(values) * _TRIMMED)
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def _interval(values: Sequence[float]) -> tuple[float, float]:
    resampled = random.Random(1)
    found = sorted(_trimmed(resampled.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return found[int(0.025 * _RESAMPLES)], found[int(0.975 * _RESAMPLES)]


def report(title: str, spent: Spent) -> None:
    cpu = spent["cpu"]
    medians = ", ".join(f"{side} {statistics.median(cpu[side]):.2f}" for side in SIDES)
    print(f"{title}: ms of CPU per call, median: {medians}")
    for measured in MEASURES:
        direct, ours = (spent[measured][side] for side in SIDES)
        added = [mine - theirs for mine, theirs in zip(ours, direct, strict=True)]
        low, high = _interval(added)
        print(
            f"  asyncmodels adds {_trimmed(added):.3f} ms of {measured} (95%: {low:.3f} to {high:.3f}; "
            f"median {statistics.median(added):.3f}; {len(added)} pairs)"
        )


async def measured(url: str, arguments: argparse.Namespace) -> dict[str, Spent]:
    settings: dict[str, Any] = {"policies": []} if arguments.bare else {}
    async with LiteLLMModel("openai/benchmark", api_base=url, api_key="behind", **settings) as model:
        return {
            title: await measure(model, url, stream=stream, rounds=arguments.rounds, pairs=pairs)
            for title, stream, pairs in (
                ("whole answer", False, arguments.pairs),
                (f"stream of {CHUNKS} chunks", True, arguments.streams),
            )
            if pairs
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="rounds, garbage being collected before each")
    parser.add_argument("--pairs", type=int, default=100, help="pairs of whole answers in a round")
    parser.add_argument("--streams", type=int, default=10, help="pairs of streams in a round")
    parser.add_argument("--bare", action="store_true", help="without the default policies")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    arguments = parser.parse_args()
    with running(delay=0.0, chunks=CHUNKS, interval=0.0) as url:
        found = asyncio.run(measured(f"{url}/v1", arguments))
    print(f"litellm {version('litellm')}, Python {sys.version.split()[0]}")
    for title, spent in found.items():
        report(title, spent)
    if arguments.json:
        arguments.json.write_text(json.dumps({"python": sys.version, "spent": found}, indent=1))


if __name__ == "__main__":
    main()
