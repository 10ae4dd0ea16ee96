"""One SmolagentsModel and many threads: nothing mixes, nothing leaks, everything can be left."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from asyncmodels.backend import Backend
from asyncmodels.integrations.smolagents import SmolagentsModel
from asyncmodels.model import Model
from asyncmodels.testing import EVERYTHING, ScriptedBackend
from asyncmodels.types import Delta, Request, Response, Usage

THREADS = 50


class Meeting(Backend):
    """Answers nobody before all have come: that they are all in flight at once is what lets them end."""

    capabilities = EVERYTHING

    def __init__(self, count: int) -> None:
        self.count = count
        self.waiting: list[Any] = []
        self.threads: set[int] = set()

    async def generate(self, request: Request, /) -> Response:
        import asyncio

        self.threads.add(threading.get_ident())
        arrived = asyncio.get_running_loop().create_future()
        self.waiting.append(arrived)
        if len(self.waiting) == self.count:
            for other in self.waiting:
                other.set_result(None)
        await arrived
        return Response(content=request.messages[0].text, finish_reason="stop", usage=Usage(1, request.seed or 0))

    @asynccontextmanager
    async def stream(self, request: Request, /) -> AsyncIterator[AsyncIterator[Delta]]:
        response = await self.generate(request)

        async def deltas() -> AsyncIterator[Delta]:
            for character in response.content or "":
                yield Delta(content=character)
            yield Delta(finish_reason="stop", usage=response.usage)

        yield deltas()

    async def aclose(self) -> None:
        pass


def ask(model: SmolagentsModel, number: int) -> tuple[str, int]:
    message = model.generate([{"role": "user", "content": f"agent {number}"}], seed=number)
    assert message.token_usage is not None
    return message.content, message.token_usage.output_tokens


def read(model: SmolagentsModel, number: int) -> tuple[str, int]:
    pieces = list(model.generate_stream([{"role": "user", "content": f"agent {number}"}], seed=number))
    assert pieces[-1].token_usage is not None
    return "".join(piece.content or "" for piece in pieces), pieces[-1].token_usage.output_tokens


def test_threads_are_served_at_the_same_time_and_apart() -> None:
    """Fifty threads that ask one model are in flight together, on one loop, and each gets its own answer."""
    for work in (ask, read):
        backend = Meeting(THREADS)
        model = SmolagentsModel(Model(backend))
        with ThreadPoolExecutor(THREADS) as threads:
            answers = list(threads.map(work, [model] * THREADS, range(THREADS)))
        assert answers == [(f"agent {number}", number) for number in range(THREADS)]
        assert len(backend.threads) == 1
        assert model.model.statistics().running == 0


def test_short_lived_threads_leave_nothing_behind() -> None:
    """A thread for each call, as agents have it, makes no thread of ours and keeps none."""
    model = SmolagentsModel(Model(ScriptedBackend("x", repeat=True)))
    ask(model, 0)
    before = set(threading.enumerate())
    for number in range(20):
        thread = threading.Thread(target=ask, args=(model, number))
        thread.start()
        thread.join()
    assert set(threading.enumerate()) <= before


def test_a_stream_that_nobody_reads_any_more_ends() -> None:
    """A generator that is dropped unfinished ends its request."""
    backend = Meeting(1)
    model = SmolagentsModel(Model(backend))
    stream = model.generate_stream([{"role": "user", "content": "a long answer"}])
    assert next(stream).content == "a"
    del stream
    gc.collect()
    assert model.model.statistics().running == 0


def test_an_interrupt_ends_the_request() -> None:
    """Ctrl-C in an agent's call, or in its stream, cancels what it waits for, at once."""
    script = """
    import math, sys, threading
    from asyncmodels import Delta, Model
    from asyncmodels.integrations.smolagents import SmolagentsModel
    from asyncmodels.testing import Delay, ScriptedBackend

    backend = ScriptedBackend([Delta(content="a"), Delay(math.inf)], repeat=True)
    model = SmolagentsModel(Model(backend))
    messages = [{"role": "user", "content": "Hello"}]

    def tell(requests):
        # An interrupt before the main thread waits for the answer would not be one of the call.
        while len(backend.requests) < requests or not waits():
            pass
        print("ready", flush=True)

    def waits():
        frame = sys._current_frames()[threading.main_thread().ident]
        top, names = frame.f_code, []
        while frame is not None:
            names.append(frame.f_globals["__name__"])
            frame = frame.f_back
        waiting = top.co_filename == threading.__file__ or top.co_name == "__next__"
        return waiting and "asyncmodels.sync" in names

    def read():
        for _ in model.generate_stream(messages):
            threading.Thread(target=tell, args=(1,)).start()

    def ask():
        threading.Thread(target=tell, args=(2,)).start()
        model.generate(messages)

    for work in (read, ask):
        try:
            work()
        except KeyboardInterrupt:
            print("interrupted", backend.running, model.model.statistics().running, flush=True)
    """
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(2):
            assert process.stdout.readline() == "ready\n"
            os.kill(process.pid, signal.SIGINT)
            assert process.stdout.readline() == "interrupted 0 0\n"
        assert process.wait(60) == 0
