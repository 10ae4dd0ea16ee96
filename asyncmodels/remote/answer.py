"""What came back over HTTP, whole or as a stream of events, as a Response or Deltas."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

import httpx2
import orjson

from asyncmodels.errors import AsyncModelsError, InvalidResponseError, StreamError, TruncatedResponseError
from asyncmodels.remote.limit_headers import rate_limits_of
from asyncmodels.remote.logprob_gate import LogprobGate
from asyncmodels.remote.pool import body_of, read_body
from asyncmodels.remote.sse import ServerSentEvent, SSEDecoder
from asyncmodels.remote.status import error_from_body, request_id_of
from asyncmodels.remote.wire import ChunkReader, response_from
from asyncmodels.stopping import StopMatcher, cut
from asyncmodels.types import Delta, Request, Response, Timing, evolve

__all__ = ["Read", "Reader", "deltas_of", "one_delta_of", "response_of", "without"]


class Read(Protocol):
    """What makes a Response of the JSON of a whole answer."""

    def __call__(self, data: Any, *, request_id: str | None, service: float | None) -> Response: ...


class Reader(Protocol):
    """What makes Deltas of the JSON of one event after the other."""

    @property
    def ended(self) -> bool:
        """Whether nothing more can come."""
        ...

    @property
    def finished(self) -> bool:
        """Whether the provider has said why it ended."""
        ...

    @property
    def answered(self) -> bool:
        """Whether there was anything that is an answer."""
        ...

    def read(self, chunk: Any) -> Delta | None: ...

    def last(self, *, content: str = "", stopped: bool = False, timing: Timing | None = None) -> Delta: ...


def response_of(answer: httpx2.Response, request: Request, started: float, read: Read = response_from) -> Response:
    """The Response of a whole answer that came with a good status."""
    try:
        data = orjson.loads(answer.content)
    except ValueError:
        raise _not_json(answer) from None  # the parser's error holds the whole body
    try:
        response = read(data, request_id=None, service=time.perf_counter() - started)
    except AsyncModelsError as error:
        error.request_id = request_id_of(answer.headers)
        error.rate_limits = rate_limits_of(answer)
        raise
    limits = rate_limits_of(answer)
    if limits is not None:
        response = evolve(response, rate_limits=limits)
    if request.stop_sequences and response.content:
        # Not every server honours every stop; where it did, this finds nothing.
        text, stop = cut(response.content, request.stop_sequences)
        if stop is not None:
            logprobs = None if response.logprobs is None else tuple(LogprobGate(response.logprobs).until(len(text)))
            # What the provider wants back is the whole of what it wrote, which this no longer is.
            return evolve(response, content=text, finish_reason="stop", logprobs=logprobs, extra=None)
    return response


async def one_delta_of(
    answer: httpx2.Response, request: Request, started: float, secret: str | None, read: Read = response_from
) -> AsyncGenerator[Delta, None]:
    """The answer of a server that was asked to stream and did not."""
    await read_body(answer)
    try:
        yield response_of(answer, request, started, read).as_delta()
    except AsyncModelsError as error:
        raise without(secret, error) from error.__cause__


async def deltas_of(
    answer: httpx2.Response, request: Request, started: float, secret: str | None, reader: Reader | None = None
) -> AsyncGenerator[Delta, None]:
    """The Deltas of a stream of server-sent events.

    Raises TruncatedResponseError when it is cut off, InvalidResponseError when it ends without an answer.
    """
    decoder, reader = SSEDecoder(), ChunkReader() if reader is None else reader
    matcher = StopMatcher(request.stop_sequences) if request.stop_sequences else None
    gate = LogprobGate()
    first_token: float | None = None
    pieces = body_of(answer)
    ended = False
    try:
        async for piece in pieces:
            for event in decoder.feed(piece):
                if event.data == b"[DONE]":
                    ended = True
                    break
                delta = _delta(event, reader)
                if delta is None:
                    if reader.ended:
                        ended = True
                        break
                    continue
                if first_token is None:
                    first_token = time.perf_counter() - started
                    limits = rate_limits_of(answer)
                    if limits is not None:
                        delta = evolve(delta, rate_limits=limits)
                if matcher is not None and (delta.content or delta.logprobs):
                    text = matcher.push(delta.content)
                    shown = gate.push(delta.logprobs, len(text))
                    if matcher.matched:
                        timing = Timing(first_token=first_token, service=time.perf_counter() - started)
                        last = reader.last(content=text, stopped=True, timing=timing)
                        # Beside the text in which the stop is found there may be more, such as who answers.
                        yield evolve(
                            last,
                            logprobs=shown,
                            reasoning=delta.reasoning,
                            tool_calls=delta.tool_calls,
                            model=delta.model or last.model,
                            id=delta.id or last.id,
                            rate_limits=delta.rate_limits,
                        )
                        return
                    delta = evolve(delta, content=text, logprobs=shown)
                yield delta
            if ended:
                break
    except AsyncModelsError as error:
        raise without(secret, error) from error.__cause__
    if not ended and not reader.finished:
        raise TruncatedResponseError("The stream ended without a finish reason: it was cut off.")
    if not reader.finished and not reader.answered:
        raise InvalidResponseError(
            "The stream ended without an answer.", status=answer.status_code, request_id=request_id_of(answer.headers)
        )
    timing = Timing(first_token=first_token, service=time.perf_counter() - started)
    last = reader.last(content=matcher.flush() if matcher is not None else "", timing=timing)
    limits = rate_limits_of(answer) if first_token is None else None
    yield evolve(last, logprobs=gate.rest(), rate_limits=limits)
    await _drain(pieces)


def _delta(event: ServerSentEvent, reader: Reader) -> Delta | None:
    try:
        chunk = orjson.loads(event.data)
    except ValueError:
        if event.event == b"error":
            raise error_from_body(event.data.decode(errors="replace"), default=StreamError) from None
        raise InvalidResponseError("A piece of the stream is not JSON.") from None
    if event.event == b"error":
        raise error_from_body(chunk.get("error", chunk) if isinstance(chunk, dict) else chunk, default=StreamError)
    return reader.read(chunk)


async def _drain(pieces: AsyncIterator[bytes]) -> None:
    """Reads the end of the body, so that the connection can be used again; a server that holds it open loses it."""
    try:
        async with asyncio.timeout(_DRAIN):
            async for _ in pieces:
                pass
    except (TimeoutError, AsyncModelsError):
        return  # the answer is whole; only the connection is lost, and the pool closes it


_DRAIN = 0.25


def _not_json(answer: httpx2.Response) -> InvalidResponseError:
    kind = answer.headers.get("content-type", "no content type").partition(";")[0]
    what = "nothing" if not answer.content.strip() else f"{kind}, which is not JSON"
    return InvalidResponseError(
        f"The provider answered {answer.status_code} with {what}.",
        status=answer.status_code,
        request_id=request_id_of(answer.headers),
    )


def without(secret: str | None, error: AsyncModelsError) -> AsyncModelsError:
    """``error`` without the key that some servers repeat when they refuse it.

    What stands for a key where none is needed ("none") is no secret; and a short one is not looked for inside of words.
    """
    if secret and secret.lower() not in _STAND_INS:
        pattern = re.escape(secret)
        hidden = re.compile(pattern if len(secret) >= _LONG else rf"(?<!\w){pattern}(?!\w)")
        error.message = hidden.sub("***", error.message)
        error.args = (error.message, *error.args[1:])
        error.code = None if error.code is None else hidden.sub("***", error.code)
    return error


_LONG = 8
_STAND_INS = frozenset(
    {
        *(
            "-",
            "any",
            "anything",
            "api-key",
            "apikey",
            "api_key",
            "default",
            "dummy",
            "empty",
            "fake",
            "key",
            "llama.cpp",
        ),
        *(
            "lm-studio",
            "local",
            "localhost",
            "no",
            "no-key",
            "no-key-required",
            "nokey",
            "none",
            "not-needed",
            "nothing",
        ),
        *(
            "not_needed",
            "null",
            "ollama",
            "openai",
            "placeholder",
            "secret",
            "sglang",
            "sk-no-key-required",
            "test",
            "tgi",
        ),
        *("token", "token-abc123", "unused", "vllm", "your-api-key"),
    }
)
