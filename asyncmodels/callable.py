"""Any function of messages as a model: sync or async, returning text or an object with ``.content``."""

from __future__ import annotations

import base64
import inspect
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

from anyio import CapacityLimiter, to_thread

from asyncmodels.backend import ALL_GRAMMARS, ALL_SAMPLING, Backend, Capabilities
from asyncmodels.errors import ConfigurationError, InvalidResponseError
from asyncmodels.model import Model
from asyncmodels.request import Parameters
from asyncmodels.stopping import StopMatcher, cut
from asyncmodels.types import Delta, ImagePart, Message, Request, Response, ResponseBuilder, ToolCall, Usage

__all__ = ["CallableBackend", "CallableModel"]


class CallableModel(Model):
    """A model made from a function::

        def shout(messages, stop_sequences=None):
            return messages[-1]["content"].upper()

        model = CallableModel(shout)

    ``function`` gets ``messages`` as dicts (role, content: text, or parts where there are images) and, by name, those
    of ``stop_sequences``, ``max_tokens``, ``temperature``, ``tools``, ``response_format``, ``grammar``, ... that its
    signature takes. A parameter that it does not take is an UnsupportedError, except stop sequences and the response
    format, which are seen to here in any case. It returns a string or an object with ``.content`` (tool calls and
    usage are taken over where they are there), or is an async generator of strings or Deltas, which streams.

    A sync function runs in a worker thread; cancelling the call cannot interrupt it there, it is left to end by
    itself, and the end of the program waits for it. An exception of the function's own passes through unchanged.

    ``model_id``, the function's name unless it is given, is how a journal knows the model: give another one when the
    function has changed. A lambda has none.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *policies: Callable[[Backend], Backend],
        model_id: str | None = None,
        **defaults: Unpack[Parameters],
    ) -> None:
        super().__init__(CallableBackend(function), *policies, defaults=defaults, model_id=model_id or _name(function))


class CallableBackend(Backend):
    """The Backend of ``CallableModel``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        if not callable(function):
            raise ConfigurationError(f"CallableModel needs a function, not {type(function).__name__}.")
        self._function = function
        self._takes = _parameters(function)
        target = function.func if isinstance(function, partial) else function
        call = target if inspect.isroutine(target) else type(target).__call__
        self._generates = inspect.isasyncgenfunction(call)
        self._awaits = inspect.iscoroutinefunction(call)
        self.capabilities = _capabilities(self._takes)

    async def generate(self, request: Request, /) -> Response:
        if self._generates:
            builder = ResponseBuilder()
            async with self.stream(request) as deltas:
                async for delta in deltas:
                    builder.add(delta)
            return builder.response()
        arguments = self._arguments(request)
        messages = [_as_dict(message) for message in request.messages]
        if self._awaits:
            answer = await self._function(messages, **arguments)
        else:
            # A limit of threads here would be a second, hidden one, and a deadlock where a function asks a model that
            # is made of a function too.
            answer = await to_thread.run_sync(
                partial(self._function, messages, **arguments),
                abandon_on_cancel=True,
                limiter=CapacityLimiter(math.inf),
            )
            if inspect.isawaitable(answer):
                answer = await answer
        return _response(answer, request.stop_sequences)

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return self._generator_stream(request) if self._generates else self._whole_stream(request)

    @asynccontextmanager
    async def _generator_stream(self, request: Request) -> AsyncIterator[AsyncIterator[Delta]]:
        messages = [_as_dict(message) for message in request.messages]
        async with (
            aclosing(self._function(messages, **self._arguments(request))) as pieces,
            aclosing(_deltas(pieces, request.stop_sequences)) as deltas,
        ):
            yield deltas

    @asynccontextmanager
    async def _whole_stream(self, request: Request) -> AsyncIterator[AsyncIterator[Delta]]:
        async with aclosing(_one_delta(await self.generate(request))) as deltas:
            yield deltas

    async def aclose(self) -> None:
        """Nothing is held: the function is the caller's."""

    def _arguments(self, request: Request) -> dict[str, Any]:
        wanted = {
            name: getattr(request, name)
            for name in _PASSED
            if (self._takes is None or name in self._takes) and getattr(request, name) not in (None, ())
        }
        if "stop_sequences" in wanted:
            wanted["stop_sequences"] = list(wanted["stop_sequences"])
        return {**wanted, **request.extra}


_PASSED = (*sorted(ALL_SAMPLING), "stop_sequences", "tools", "tool_choice", "response_format", "grammar", "logprobs")


def _parameters(function: Callable[..., Any]) -> frozenset[str] | None:
    """The keywords that ``function`` takes; None when it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    if not positional:
        raise ConfigurationError(f"{_name(function)} must take the messages as its first argument.")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)) - {
        positional[0].name
    }


def _capabilities(takes: frozenset[str] | None) -> Capabilities:
    def has(name: str) -> bool:
        return takes is None or name in takes

    return Capabilities(
        sampling=frozenset(name for name in ALL_SAMPLING if has(name)),
        stop=True,
        tools=has("tools"),
        tool_choice=frozenset({"auto", "none", "required", "named"}) if has("tool_choice") else frozenset({"auto"}),
        images=True,
        logprobs=has("logprobs"),
        # Content can be checked against a format whoever wrote it, so this needs no help from the function.
        response_format=True,
        grammars=ALL_GRAMMARS if has("grammar") else frozenset(),
        extra=takes is None,
    )


def _as_dict(message: Message) -> dict[str, Any]:
    content: Any = message.content
    if isinstance(content, tuple):
        if any(isinstance(part, ImagePart) for part in content):
            content = [_part(part) for part in content]
        else:
            content = message.text
    result: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        result["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    return result


def _part(part: Any) -> dict[str, Any]:
    if not isinstance(part, ImagePart):
        return {"type": "text", "text": part.text}
    url = part.url
    if part.data is not None:
        url = f"data:{part.media_type};base64,{base64.b64encode(part.data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _response(answer: Any, stops: tuple[str, ...]) -> Response:
    if isinstance(answer, Response):
        kept = cut(answer.content, stops)[0] if answer.content is not None else None
        return answer if kept == answer.content else replace(answer, content=kept)
    content: Any = answer if isinstance(answer, str) else getattr(answer, "content", _MISSING)
    calls = tuple(_tool_call(call, index) for index, call in enumerate(getattr(answer, "tool_calls", None) or ()))
    if content is _MISSING or not (isinstance(content, str) or (content is None and calls)):
        raise InvalidResponseError(
            f"The function returned {type(answer).__name__}; it must return a string or an object with .content."
        )
    usage = getattr(answer, "token_usage", None) or getattr(answer, "usage", None)
    read, written = getattr(usage, "input_tokens", None), getattr(usage, "output_tokens", None)
    return Response(
        content=None if content is None else cut(content, stops)[0],
        tool_calls=calls,
        finish_reason="tool_calls" if calls else "stop",
        usage=Usage(read, written) if isinstance(read, int) and isinstance(written, int) else None,
        raw=None if isinstance(answer, str) else answer,
    )


def _tool_call(call: Any, index: int) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    function = _member(call, "function")
    name, arguments = _member(function, "name"), _member(function, "arguments")
    if not isinstance(name, str):
        raise InvalidResponseError("The function returned a tool call without a function name.")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments if arguments is not None else {})
    return ToolCall(_member(call, "id") or f"call_{index}", name, arguments)


def _member(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


async def _one_delta(response: Response) -> AsyncGenerator[Delta, None]:
    yield response.as_delta()


async def _deltas(pieces: AsyncIterator[Any], stops: tuple[str, ...]) -> AsyncGenerator[Delta, None]:
    matcher = StopMatcher(stops)
    finished = calls = False
    async for piece in pieces:
        if not isinstance(piece, str | Delta):
            raise InvalidResponseError(
                f"The function yielded {type(piece).__name__}; it must yield strings, or Delta values."
            )
        delta = Delta(content=piece) if isinstance(piece, str) else piece
        calls = calls or bool(delta.tool_calls)
        content = matcher.push(delta.content)
        if delta.finish_reason is not None:
            finished = True
            content += matcher.flush()
        if matcher.matched:
            yield replace(delta, content=content, finish_reason="stop")
            return
        delta = delta if content == delta.content else replace(delta, content=content)
        if delta != _NOTHING:
            yield delta
    if not finished:
        yield Delta(content=matcher.flush(), finish_reason="tool_calls" if calls else "stop")


def _name(function: Callable[..., Any]) -> str | None:
    """None for a lambda: another one has the same name, and what is kept of the one is not the other's."""
    if isinstance(function, partial):
        return _name(function.func)
    name: str = getattr(function, "__name__", type(function).__name__)
    return None if name == "<lambda>" else name


_MISSING: Any = object()

_NOTHING = Delta()
