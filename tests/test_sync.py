"""The verbs without await: from scripts, threads, running loops and forks; what runs in a real process does so here."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest

from asyncmodels.callable import CallableModel
from asyncmodels.errors import (
    CallTimeoutError,
    ClosedError,
    EventLoopError,
    InvalidRequestError,
    RateLimitError,
    ResponseFormatError,
    StreamError,
)
from asyncmodels.model import Model
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.sync import SyncStream
from asyncmodels.testing import EVERYTHING, Delay, ScriptedBackend
from asyncmodels.types import Delta, Message, Request, Response

SOON = 0.02
END = Delta(finish_reason="stop")
HANG = Delay(math.inf)

SCRIPT_HEAD = """
import asyncio, math, os, signal, sys, threading
from asyncmodels import CallableModel, Delta, Model
from asyncmodels.testing import Delay, ScriptedBackend
END = Delta(finish_reason="stop")
"""


def start(script: str, *options: str) -> subprocess.Popen[str]:
    code = SCRIPT_HEAD + textwrap.dedent(script)
    return subprocess.Popen(
        [sys.executable, *(options or ("-W", "error", "-X", "dev")), "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script: str) -> str:
    """What the script printed; it must end well and write nothing to stderr, where warnings are errors."""
    with start(script) as process:
        out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    return out


def wait_until_idle(model: Model, backend: ScriptedBackend) -> None:
    """Returns once nothing runs; what never comes to rest runs into the time limit of the test."""
    while model.statistics().running or backend.running:
        threading.Event().wait(0.005)


# -- calls ------------------------------------------------------------------------------------------------------------


def test_generate_blocks_and_answers() -> None:
    """generate() without a loop returns what the model answers, with parameters passed on."""
    backend = ScriptedBackend("one two three")
    model = Model(backend)
    assert str(model.sync.generate("Hi.", max_tokens=2)) == "one two "
    assert backend.requests == [Request(messages=(Message("user", "Hi."),), max_tokens=2)]
    assert model.sync.statistics() == model.statistics()


def test_errors_come_out_as_they_are() -> None:
    """An error of the call is the very same object in the calling thread, and the next call works."""
    error = RateLimitError("slow down", retry_after=3)
    model = Model(ScriptedBackend(error, HANG, "never", "Hello."))
    with pytest.raises(RateLimitError) as caught:
        model.sync.generate("Hi.")
    assert caught.value is error
    with pytest.raises(CallTimeoutError):
        model.sync.generate("Hi.", timeout=SOON)
    with pytest.raises(InvalidRequestError):
        model.sync.generate("Hi.", max_tokens=0)
    assert str(model.sync.generate("Hi.")) == "Hello."


def test_from_many_threads_at_once() -> None:
    """Fifty threads get each its own answer, all through one loop and one limit."""

    async def echo(request: Request) -> str:
        await asyncio.sleep(0)
        return request.messages[0].text

    backend = ScriptedBackend(echo, repeat=True)
    model = Model(backend, lambda inner: Concurrency(inner, 5))
    barrier = threading.Barrier(50)

    def ask(number: int) -> list[str]:
        barrier.wait(60)
        return [str(model.sync.generate(f"{number}.{turn}")) for turn in range(10)]

    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(ask, range(50)))
    assert answers == [[f"{number}.{turn}" for turn in range(10)] for number in range(50)]
    assert backend.max_running <= 5
    assert model.statistics().running == 0
    assert len([thread for thread in threading.enumerate() if thread.name == "asyncmodels-sync"]) == 1


async def test_inside_a_running_loop() -> None:
    """In a notebook, whose loop runs already, the sync face works beside the async one of the same model."""
    model = Model(ScriptedBackend("one", "two", "three"), lambda inner: Concurrency(inner, 1))
    assert str(model.sync.generate("Hi.")) == "one"
    assert str(await model.generate("Hi.")) == "two"
    assert "".join([str(delta) for delta in model.sync.stream("Hi.")]) == "three"


def test_on_the_background_loop_itself() -> None:
    """A call from the loop that would have to serve it is an EventLoopError at once, not a deadlock."""

    async def careless(messages: Any) -> str:
        return str(Model(ScriptedBackend("never")).sync.generate(messages))

    async def careless_stream(messages: Any) -> str:
        return "".join(map(str, Model(ScriptedBackend("never")).sync.stream(messages)))

    for function in (careless, careless_stream):
        with pytest.raises(EventLoopError, match="await"):
            CallableModel(function).sync.generate("Hi.")


def test_a_sync_function_may_use_the_sync_face() -> None:
    """Models made of sync functions that ask other models work, deeper and wider than any pool of threads."""
    innermost = Model(ScriptedBackend("Hello.", repeat=True))

    def around(model: Model) -> Model:
        return CallableModel(lambda messages: str(model.sync.generate(messages)))

    model = innermost
    for _ in range(5):
        model = around(model)
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda _: str(model.sync.generate("Hi.", timeout=60)), range(20)))
    assert answers == ["Hello."] * 20


def test_context_variables_of_the_caller_reach_the_model() -> None:
    """A context variable that the calling thread has set is seen by the call."""
    who = contextvars.ContextVar("who", default="nobody")
    model = Model(ScriptedBackend(lambda request: who.get(), repeat=True))
    who.set("me")
    assert str(model.sync.generate("Hi.")) == "me"


def test_a_call_that_is_cancelled_from_inside_says_so() -> None:
    """When something in the model cancels the call, the caller gets a typed error and no CancelledError."""

    async def give_up(request: Request) -> str:
        raise asyncio.CancelledError

    model = Model(ScriptedBackend(give_up, give_up))
    with pytest.raises(ClosedError, match="cancelled"):
        model.sync.generate("Hi.")
    with pytest.raises(ClosedError):
        model.sync.stream("Hi.").response()


def test_a_call_that_wants_the_interpreter_to_end() -> None:
    """A SystemExit inside of a call reaches its caller alone: the loop goes on serving the others."""
    model = Model(ScriptedBackend(SystemExit(3), "Hello."))
    with pytest.raises(SystemExit):
        model.sync.generate("Hi.")
    assert str(model.sync.generate("Hi.")) == "Hello."


def test_closing() -> None:
    """close() and leaving the context manager close the model; later calls are a ClosedError."""
    backend = ScriptedBackend("Hello.", repeat=True)
    with Model(backend).sync as model:
        assert str(model.generate("Hi.")) == "Hello."
        assert "ScriptedBackend" in repr(model)
    assert backend.closed
    model.close()
    with pytest.raises(ClosedError):
        model.generate("Hi.")
    with pytest.raises(ClosedError):
        model.stream("Hi.")


# -- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_is_an_iterator_and_a_context_manager() -> None:
    """Both ways give every delta, and response() what generate() would have returned."""
    backend = ScriptedBackend("one two three", repeat=True)
    model = Model(backend)
    assert "".join([str(delta) for delta in model.sync.stream("Hi.")]) == "one two three"
    with model.sync.stream("Hi.") as stream:
        assert next(stream).content == "one "
        assert stream.response().content == "one two three"
        assert stream.response() is stream.response()
        assert list(stream) == []
    assert stream.response().content == "one two three"
    wait_until_idle(model, backend)


def test_deltas_come_before_the_answer_is_whole() -> None:
    """The first delta can be read while the rest is still to come."""
    go = threading.Event()

    async def later(request: Request) -> list[Delta]:
        return [Delta(content="a"), END]

    class Waiting(ScriptedBackend):
        @asynccontextmanager
        async def stream(self, request: Request, /) -> AsyncIterator[AsyncIterator[Delta]]:
            async def deltas() -> AsyncIterator[Delta]:
                yield Delta(content="a")
                await asyncio.to_thread(go.wait, 60)
                yield END

            yield deltas()

    stream = Model(Waiting(later)).sync.stream("Hi.")
    assert next(stream).content == "a"
    go.set()
    assert stream.response().content == "a"


def left_by_break(stream: SyncStream) -> None:
    for _ in stream:
        break
    del stream
    gc.collect()


def left_by_close(stream: SyncStream) -> None:
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(ClosedError):
        stream.response()
    assert list(stream) == []


def left_by_block(stream: SyncStream) -> None:
    with stream:
        next(stream)


def left_by_error(stream: SyncStream) -> None:
    def fail() -> None:
        with stream:
            next(stream)
            raise LookupError

    with pytest.raises(LookupError):
        fail()


@pytest.mark.parametrize("leave", [left_by_break, left_by_close, left_by_block, left_by_error])
def test_a_stream_that_is_left_early_is_released(leave: Callable[[SyncStream], None]) -> None:
    """However a hanging stream is left, the backend's stream is closed."""
    backend = ScriptedBackend([Delta(content="a"), HANG, END])
    model = Model(backend)
    streams = [model.sync.stream("Hi.")]
    leave(streams.pop())
    wait_until_idle(model, backend)


def test_a_stream_closed_before_it_began_never_begins() -> None:
    """Closing first sends nothing, and there is no response."""
    backend = ScriptedBackend("never")
    stream = Model(backend).sync.stream("Hi.")
    stream.close()
    assert list(stream) == []
    with pytest.raises(ClosedError):
        stream.response()
    assert backend.requests == []


def test_an_error_midway() -> None:
    """The deltas before an error are read, the error is the same object, and response() names it as its cause."""
    error = StreamError("no")
    model = Model(ScriptedBackend([Delta(content="a"), error]))
    stream = model.sync.stream("Hi.")
    assert next(stream).content == "a"
    with pytest.raises(StreamError) as caught:
        next(stream)
    assert caught.value is error
    assert list(stream) == []
    with pytest.raises(ClosedError) as closed:
        stream.response()
    assert closed.value.__cause__ is error


def test_a_broken_format_is_told_to_who_asks_for_the_response() -> None:
    """The deltas of an answer that breaks its format are read all the same; response() raises."""
    stream = Model(ScriptedBackend("no json")).sync.stream("Hi.", response_format="json")
    assert "".join(map(str, stream)) == "no json"
    for _ in range(2):
        with pytest.raises(ResponseFormatError):
            stream.response()


def test_two_threads_read_one_stream() -> None:
    """Between them two readers get every delta once, and both come to the end."""
    words = "".join(f"{number} " for number in range(200))
    stream = Model(ScriptedBackend(words)).sync.stream("Hi.")
    with ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(lambda _: [str(delta) for delta in stream], range(4)))
    assert sorted("".join("".join(part) for part in parts).split(), key=int) == words.split()


def test_the_end_reaches_every_thread_that_waits() -> None:
    """Of several threads that wait for the next delta when the stream ends, none is left waiting."""
    go = threading.Event()
    asked = threading.Semaphore(0)

    async def wait(request: Request) -> str:
        await asyncio.to_thread(go.wait, 60)
        return "one"

    stream = Model(ScriptedBackend(wait)).sync.stream("Hi.")

    def read() -> list[str]:
        asked.release()
        return [str(delta) for delta in stream]

    with ThreadPoolExecutor(4) as threads:
        readers = [threads.submit(read) for _ in range(4)]
        for _ in readers:
            asked.acquire()
        threading.Event().wait(0.05)  # time for them to begin to wait; the test holds whether they do or not
        go.set()
        assert "".join("".join(reader.result(60)) for reader in readers) == "one"


def test_closing_wakes_a_thread_that_waits() -> None:
    """A thread that waits for the next delta comes to the end when another closes the stream."""
    backend = ScriptedBackend([Delta(content="a"), HANG, END])
    model = Model(backend)
    stream = model.sync.stream("Hi.")
    next(stream)
    with ThreadPoolExecutor(1) as threads:
        rest = threads.submit(list, stream)
        stream.close()
        assert rest.result(60) == []
    wait_until_idle(model, backend)


# -- whole processes --------------------------------------------------------------------------------------------------


def test_a_script_ends_silently() -> None:
    """A plain script asks, streams, leaves a stream open, and ends without a word on stderr."""
    out = run("""
        model = Model(ScriptedBackend("one", "two", [Delta(content="three"), Delay(math.inf), END]))
        print(model.sync.generate("Hi."), model.sync.stream("Hi.").response(), end=" ")
        left = model.sync.stream("Hi.")
        print(next(left))
    """)
    assert out == "one two three\n"


def test_the_end_of_a_script_waits_for_what_is_released() -> None:
    """A stream that is open at the end of a script is closed properly, which may take its time."""
    out = run("""
        async def hang(request):
            try:
                await asyncio.sleep(math.inf)
            finally:
                await asyncio.sleep(0.2)
                print("released", flush=True)
        model = Model(ScriptedBackend(hang))
        def read():
            try:
                list(model.sync.stream("Hi."))
            except Exception:
                pass
        threading.Thread(target=read, daemon=True).start()
        while not model.statistics().running:
            pass
        print("bye", flush=True)
    """)
    assert out.splitlines() == ["bye", "released"]


def test_a_script_with_a_call_in_a_daemon_thread_ends() -> None:
    """A call that still hangs in a daemon thread keeps nobody from ending."""
    out = run("""
        called = threading.Event()
        async def hang(request):
            called.set()
            await asyncio.sleep(math.inf)
        def call():
            try:
                Model(ScriptedBackend(hang)).sync.generate("Hi.")
            except Exception:
                pass
        threading.Thread(target=call, daemon=True).start()
        called.wait()
        print("bye")
    """)
    assert out == "bye\n"


def test_no_thread_before_the_first_call_and_none_after_the_end() -> None:
    """The background thread starts with the first call, and is gone before the exit handlers are through."""
    out = run("""
        import atexit
        model = Model(ScriptedBackend("one"))
        atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))
        face = model.sync
        print([thread.name for thread in threading.enumerate()])
        face.generate("Hi.")
        print([thread.name for thread in threading.enumerate()])
    """)
    assert out.splitlines() == ["['MainThread']", "['MainThread', 'asyncmodels-sync']", "['MainThread']"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("verb", ["generate", "stream"])
def test_ctrl_c_cancels_the_call(verb: str) -> None:
    """Ctrl-C is a KeyboardInterrupt here and a cancel in the backend, which cleans up first; the next call works."""
    process = start(f"""
        async def hang(request):
            print("called", flush=True)
            try:
                await asyncio.sleep(math.inf)
            except asyncio.CancelledError:
                await asyncio.sleep(0.05)  # as draining a connection takes its time
                print("cancelled", flush=True)
                raise
        model = Model(ScriptedBackend(hang, "Hello."))
        try:
            if {verb!r} == "generate":
                model.sync.generate("Hi.")
            else:
                next(model.sync.stream("Hi."))
        except KeyboardInterrupt:
            print("interrupted", model.statistics().running, model.sync.generate("Hi."))
    """)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "called\n"
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert out.splitlines() == ["cancelled", "interrupted 0 Hello."]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_fork() -> None:
    """A child forked after a call starts its own loop, and the parent's goes on."""
    out = run("""
        model = Model(ScriptedBackend("Hello.", repeat=True))
        model.sync.generate("Hi.")
        child = os.fork()
        if child == 0:
            print("child", model.sync.generate("Hi."), flush=True)
            sys.exit()
        assert os.waitpid(child, 0)[1] == 0
        print("parent", model.sync.generate("Hi."))
    """)
    assert out.splitlines() == ["child Hello.", "parent Hello."]


class Slow(ScriptedBackend):
    """Closing takes its time, so that a loop that ends must wait for it."""

    @asynccontextmanager
    async def stream(self, request: Request, /) -> AsyncIterator[AsyncIterator[Delta]]:
        async with super().stream(request) as deltas:
            try:
                yield deltas
            finally:
                await asyncio.sleep(SOON)


def test_closing_waits_for_the_release() -> None:
    """When close() returns, the backend's stream is closed, however long that took."""
    backend = Slow([Delta(content="a"), HANG, END])
    model = Model(backend)
    stream = model.sync.stream("Hi.")
    next(stream)
    stream.close()
    assert backend.running == 0


def test_the_capabilities_are_the_models() -> None:
    """The sync face checks parameters where they are given, as the async one does."""
    assert Model(ScriptedBackend("a")).capabilities == EVERYTHING
    with pytest.raises(InvalidRequestError):
        Model(ScriptedBackend("a")).sync.stream("Hi.", max_tokens=0)


def test_responses_are_whole_values() -> None:
    """What the sync face returns is a Response like any other."""
    assert isinstance(Model(ScriptedBackend("a")).sync.generate("Hi."), Response)
