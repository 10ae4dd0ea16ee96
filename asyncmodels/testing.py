"""What asyncmodels' own tests use, for yours: a backend that answers from a script, and a clock that never waits.

>>> import asyncio
>>> from asyncmodels.errors import RateLimitError
>>> from asyncmodels.policies.retry import Retry
>>> from asyncmodels.testing import FakeClock, ScriptedBackend
>>> from asyncmodels.types import Message, Request
>>>
>>> async def main():
...     async with FakeClock(autojump=True) as clock:
...         backend = ScriptedBackend(RateLimitError("slow down", retry_after=30), "Paris.", clock=clock)
...         response = await Retry(backend, clock=clock).generate(Request(messages=(Message("user", "Where?"),)))
...         print(response, "after", response.attempts, "attempts;", "waited:", clock.time() >= 30)
...
>>> asyncio.run(main())
Paris. after 2 attempts; waited: True
"""

from __future__ import annotations

import asyncio
import heapq
import inspect
import math
import re
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from asyncmodels.backend import ALL_GRAMMARS, ALL_SAMPLING, Backend, Capabilities
from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import AsyncModelsError, ClosedError, ConfigurationError, TruncatedResponseError
from asyncmodels.stopping import cut
from asyncmodels.types import Delta, FinishReason, Request, Response, ResponseBuilder, ToolCallDelta, Usage

__all__ = ["EVERYTHING", "Delay", "FakeClock", "ScriptExhaustedError", "ScriptItem", "ScriptedBackend"]

EVERYTHING = Capabilities(
    sampling=ALL_SAMPLING,
    tools=True,
    images=True,
    provider_parts=True,
    logprobs=True,
    response_format=True,
    grammars=ALL_GRAMMARS,
    extra=True,
    scores=True,
)
"""The capabilities of a backend that accepts every parameter."""


# -- the clock --------------------------------------------------------------------------------------------------------


class FakeClock:
    """A Clock whose time passes only when told: by ``await clock.advance(seconds)``, or, with ``autojump=True`` and
    inside ``async with clock``, by jumping to the next wake-up whenever every task of the loop waits.

    "Every task waits" means that the loop has no callback ready to run. Sockets, worker threads and real timers are
    invisible to it: where a test waits on those, it advances the clock itself. One clock serves one event loop.

    ``wall_start`` is the wall time, in seconds since 1970, at which ``time()`` is zero.
    """

    def __init__(self, *, autojump: bool = False, wall_start: float = 1_700_000_000.0) -> None:
        self._autojump = autojump
        self._wall_start = wall_start
        self._now = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._arrivals = 0
        self._sleeping = 0
        self._somebody_sleeps: asyncio.Event = asyncio.Event()
        self._jumper: asyncio.Task[None] | None = None

    def time(self) -> float:
        return self._now

    def wall_time(self) -> float:
        return self._wall_start + self._now

    @property
    def sleeping(self) -> int:
        """How many tasks are asleep in this clock."""
        return self._sleeping

    async def sleep(self, seconds: float) -> None:
        """Returns once ``seconds`` of this clock have passed; ``math.inf`` sleeps until cancelled."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + seconds, self._arrivals, future))
        self._arrivals += 1
        self._sleeping += 1
        self._somebody_sleeps.set()
        try:
            await future
        finally:
            self._sleeping -= 1
            future.cancel()
            self._drop_cancelled()

    async def advance(self, seconds: float) -> None:
        """Lets ``seconds`` pass. Sleepers wake in their order, each at its own time, and what they start in turn runs
        before time goes on; on return every task waits again."""
        if seconds < 0:
            raise ConfigurationError("Time does not go back: advance() needs a number of seconds >= 0.")
        until = self._now + seconds
        await self.settle()
        while (wake_up := self._next_wake_up()) <= until and wake_up != math.inf:
            self._jump_to(wake_up)
            await self.settle()
        self._now = until

    async def settle(self) -> None:
        """Returns once every other task of the loop waits for something; no time passes."""
        await _settle()

    def _next_wake_up(self) -> float:
        self._drop_cancelled()
        return self._sleepers[0][0] if self._sleepers else math.inf

    def _drop_cancelled(self) -> None:
        while self._sleepers and (self._sleepers[0][2].done() or not self._sleeping):
            heapq.heappop(self._sleepers)

    def _jump_to(self, time: float) -> None:
        self._now = time
        while self._sleepers and self._sleepers[0][0] <= time:
            future = heapq.heappop(self._sleepers)[2]
            if not future.done():
                future.set_result(None)

    async def _jump(self) -> None:
        while True:
            await self._somebody_sleeps.wait()
            await _settle()
            wake_up = self._next_wake_up()
            if wake_up == math.inf:
                # Nobody sleeps, or those who do never wake by themselves: the next sleeper says when to look again.
                self._somebody_sleeps.clear()
            else:
                self._jump_to(wake_up)

    async def __aenter__(self) -> FakeClock:
        if self._autojump:
            self._jumper = asyncio.create_task(self._jump(), name="FakeClock.autojump")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._jumper is not None:
            self._jumper.cancel()
            with suppress(asyncio.CancelledError):
                await self._jumper
            self._jumper = None

    def __repr__(self) -> str:
        return f"<FakeClock at {self._now:g} s, {self._sleeping} asleep>"


_settling: WeakKeyDictionary[asyncio.AbstractEventLoop, int] = WeakKeyDictionary()


async def _settle() -> None:
    # A task that yields to the loop once runs after all callbacks that were ready. What then is left in the ready
    # queue was added by those; when it is empty, nobody can go on without time or the outside world. Others that
    # settle at the same moment are always in the queue and do not count as work.
    loop = asyncio.get_running_loop()
    ready = getattr(loop, "_ready", None)
    _settling[loop] = _settling.get(loop, 0) + 1
    try:
        if ready is None:  # a foreign loop, such as uvloop, hides its queue; this many turns settle any test of ours
            for _ in range(200):
                await asyncio.sleep(0)
            return
        while True:
            await asyncio.sleep(0)
            if len(ready) < _settling[loop]:
                return
    finally:
        _settling[loop] -= 1


# -- the backend ------------------------------------------------------------------------------------------------------


class ScriptExhaustedError(AsyncModelsError, AssertionError):
    """Raised by a ScriptedBackend that is asked more often than its script has replies."""


@dataclass(frozen=True, slots=True)
class Delay:
    """In a script: the next reply comes only after ``seconds``. Among Deltas: the stream pauses there.

    ``Delay(math.inf)`` never answers.
    """

    seconds: float


Piece: TypeAlias = Delta | Delay | BaseException
Reply: TypeAlias = str | Response | Sequence[Piece] | BaseException | type[BaseException]
ScriptItem: TypeAlias = Reply | Delay | Callable[[Request], "Reply | Awaitable[Reply]"]


class ScriptedBackend(Backend):
    """A Backend that answers from a script, one item a call, in the order in which the calls come in::

        ScriptedBackend("Hello.", RateLimitError("slow down"), Delay(2), "Hello again.", clock=clock)

    An item is

    - a ``str``: the content. It is cut at the request's stop sequences and after ``max_tokens`` words, a word with the
      whitespace after it counts as one token, and a stream sends it word by word;
    - a ``Response``: returned as it is; a stream sends its content word by word;
    - an exception or an exception class: raised;
    - a list or tuple of ``Delta``, ``Delay`` and exceptions: what a stream does, in this order; ``generate`` adds the
      deltas up. Without a finish reason it ends in a TruncatedResponseError, as every cut stream does;
    - a ``Delay``: waiting before the item that follows it;
    - a sync or async function of the Request that returns one of the above, except a Delay.

    With ``repeat=True`` the script starts over when it ends; without, a call too many is a ScriptExhaustedError.

    ``requests`` are the requests that were sent, in order; ``running`` and ``max_running`` how many calls are, and at
    most were, inside at once; ``closed`` whether ``aclose`` was called.
    """

    def __init__(
        self,
        *script: ScriptItem,
        repeat: bool = False,
        capabilities: Capabilities = EVERYTHING,
        clock: Clock = SYSTEM_CLOCK,
        model: str = "scripted",
    ) -> None:
        for item in script:
            _check_item(item)
        self.capabilities = capabilities
        self.requests: list[Request] = []
        self.running = 0
        self.max_running = 0
        self.closed = False
        self._script = tuple(script)
        self._left = deque(script)
        self._repeat = repeat
        self._clock = clock
        self._model = model
        self._lock = threading.Lock()

    async def generate(self, request: Request, /) -> Response:
        with self._inside(request, streaming=False) as (number, delay, item):
            await self._pause(delay)
            reply = await _resolve(item, request)
            if isinstance(reply, str):
                return self._response(reply, request, number)
            if isinstance(reply, Response):
                return reply
            if isinstance(reply, list | tuple):
                builder = ResponseBuilder()
                async for delta in self._play(reply):
                    builder.add(delta)
                return builder.response()
            raise _exception(reply)

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return self._stream(request)

    @asynccontextmanager
    async def _stream(self, request: Request) -> AsyncIterator[AsyncIterator[Delta]]:
        with self._inside(request, streaming=True) as (number, delay, item):
            await self._pause(delay)
            reply = await _resolve(item, request)
            if isinstance(reply, str):
                reply = self._response(reply, request, number)
            if isinstance(reply, Response):
                reply = _deltas(reply)
            if not isinstance(reply, list | tuple):
                raise _exception(reply)
            deltas = self._play(reply)
            try:
                yield deltas
            finally:
                await deltas.aclose()

    async def aclose(self) -> None:
        self.closed = True

    def identity(self) -> Mapping[str, Any]:
        return {"model": self._model}

    def statistics(self) -> ScriptedStatistics:
        return ScriptedStatistics(requests=len(self.requests), running=self.running, max_running=self.max_running)

    def __repr__(self) -> str:
        left = "repeating" if self._repeat else f"{len(self._left)} left"
        return f"<ScriptedBackend [{len(self._script)} items, {left} | {self.running} running]>"

    @contextmanager
    def _inside(self, request: Request, *, streaming: bool) -> Iterator[tuple[int, float, ScriptItem]]:
        if self.closed:
            raise ClosedError("This ScriptedBackend was closed.")
        self.capabilities.check(request, streaming=streaming)
        with self._lock:
            self.requests.append(request)
            number = len(self.requests)
            delay, item = self._take(number)
            self.running += 1
            self.max_running = max(self.max_running, self.running)
        try:
            yield number, delay, item
        finally:
            with self._lock:
                self.running -= 1

    def _take(self, number: int) -> tuple[float, ScriptItem]:
        delay = 0.0
        for _ in range(len(self._script) + 1):
            if not self._left and self._repeat:
                self._left.extend(self._script)
            if not self._left:
                break
            item = self._left.popleft()
            if not isinstance(item, Delay):
                return delay, item
            delay += item.seconds
        raise ScriptExhaustedError(f"The script has no reply for request number {number}; pass more, or repeat=True.")

    async def _pause(self, seconds: float) -> None:
        if seconds:
            await self._clock.sleep(seconds)

    async def _play(self, pieces: Sequence[Piece]) -> AsyncGenerator[Delta, None]:
        finished = False
        for piece in pieces:
            if isinstance(piece, Delta):
                finished = finished or piece.finish_reason is not None
                yield piece
            elif isinstance(piece, Delay):
                await self._clock.sleep(piece.seconds)
            else:
                raise _exception(piece)
        if not finished:
            raise TruncatedResponseError("The stream ended without a finish reason.")

    def _response(self, text: str, request: Request, number: int) -> Response:
        finish: FinishReason = "stop"
        words = _words(text)
        if request.max_tokens is not None and len(words) > request.max_tokens:
            words, finish = words[: request.max_tokens], "length"
        text, stop = cut("".join(words), request.stop_sequences)
        if stop is not None:
            finish = "stop"
        prompt = sum(len(message.text.split()) for message in request.messages)
        return Response(
            content=text,
            finish_reason=finish,
            usage=Usage(prompt, len(_words(text))),
            model=self._model,
            id=f"{self._model}-{number}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedStatistics:
    """How many requests a ScriptedBackend got, and how many are, and at most were, inside at once."""

    requests: int
    running: int
    max_running: int


def _words(text: str) -> list[str]:
    return re.findall(r"\S+\s*|^\s+", text)


def _deltas(response: Response) -> list[Piece]:
    pieces: list[Piece] = []
    if response.reasoning:
        pieces += [Delta(reasoning=word) for word in _words(response.reasoning)]
    if response.content:
        pieces += [Delta(content=word) for word in _words(response.content)]
    pieces += [
        Delta(tool_calls=(ToolCallDelta(index, call.id, call.name, call.arguments),))
        for index, call in enumerate(response.tool_calls)
    ]
    last = Delta(
        finish_reason=response.finish_reason,
        usage=response.usage,
        logprobs=response.logprobs or (),
        model=response.model,
        id=response.id,
        timing=response.timing,
        attempts=response.attempts if response.attempts > 1 else None,
    )
    return [*pieces, last]


async def _resolve(item: ScriptItem, request: Request) -> Reply:
    if isinstance(item, type) or not callable(item):
        reply: Any = item
    else:
        reply = item(request)
        if inspect.isawaitable(reply):
            reply = await reply
        _check_item(reply)
    return reply  # type: ignore[no-any-return]  # _check_item and _take left nothing but a Reply


def _exception(error: Any) -> BaseException:
    if isinstance(error, type):
        error = error("scripted")
    # A script that repeats raises one object again and again; without this its traceback would grow for ever.
    return error.with_traceback(None)  # type: ignore[no-any-return]  # _check_item let only exceptions through


def _check_item(item: object) -> None:
    if isinstance(item, list | tuple):
        wrong = [piece for piece in item if not isinstance(piece, Delta | Delay | BaseException)]
        if wrong:
            raise ConfigurationError(
                f"A list in a script is one stream of Delta, Delay and exceptions, not of {type(wrong[0]).__name__}; "
                "pass several replies as separate arguments: ScriptedBackend('one', 'two')."
            )
    elif isinstance(item, type):
        if not issubclass(item, BaseException):
            raise ConfigurationError(f"A script cannot play {item!r}.")
    elif not isinstance(item, str | Response | BaseException | Delay) and not callable(item):
        raise ConfigurationError(f"A script cannot play a {type(item).__name__}.")
