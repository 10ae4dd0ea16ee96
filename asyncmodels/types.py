"""The values that travel: messages in, one Request down the chain, Deltas and one Response back up.

All of them are frozen; those made by the thousand have no slots (see ``make``). Sequences are tuples, so that a
Request can be kept, compared and sent twice. Units: times are seconds, lengths are tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

__all__ = [
    "EBNF",
    "Allowance",
    "Choice",
    "Delta",
    "FinishReason",
    "Grammar",
    "ImagePart",
    "JSONSchema",
    "Message",
    "Part",
    "ProviderPart",
    "RateLimits",
    "Regex",
    "Request",
    "Response",
    "ResponseBuilder",
    "ResponseFormat",
    "Role",
    "Score",
    "TextPart",
    "Timing",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "Usage",
    "evolve",
    "make",
]

Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]
FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter", "error"]


T = TypeVar("T")


def make(cls: type[T], /, **fields: Any) -> T:
    """``cls(**fields)`` for the hot path, for a frozen dataclass of this module that has no slots.

    A frozen dataclass sets its fields one by one through ``object.__setattr__``: 5 µs for one of thirteen fields, where
    this takes 0.7. Fields that are left out are read from the class, so those without a plain default must be given.
    """
    value = object.__new__(cls)
    value.__dict__.update(fields)
    return value


def evolve(value: T, /, **changes: Any) -> T:
    """``dataclasses.replace`` for the hot path, with the terms of ``make``."""
    twin = object.__new__(type(value))
    twin.__dict__.update(value.__dict__)
    twin.__dict__.update(changes)
    return twin


# -- messages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text inside a message. ``extra`` is passed to the provider beside it (``cache_control``)."""

    text: str
    extra: Mapping[str, Any] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePart:
    """An image inside a message: exactly one of ``data`` (encoded bytes), ``url`` or ``source``.

    ``source`` is a path or a PIL image; it is read and encoded, off the event loop, when the request is built, so that
    backends only ever see ``data`` with its ``media_type`` (``"image/png"``) or a ``url``.
    """

    data: bytes | None = field(default=None, repr=False)
    url: str | None = None
    source: Any = None
    media_type: str | None = None
    detail: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ProviderPart:
    """A piece of a message in a provider's own shape, sent as it is: ``{"type": "file", ...}``, a video."""

    value: Mapping[str, Any]


Part: TypeAlias = TextPart | ImagePart | ProviderPart


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model asks for. ``arguments`` is the JSON text exactly as the model wrote it.

    ``extra`` is what the provider wants to have back with the call, such as the signature of a thought.
    """

    id: str
    name: str
    arguments: str = "{}"
    extra: Mapping[str, Any] | None = field(default=None, kw_only=True, repr=False)

    def parse_arguments(self) -> dict[str, Any]:
        """The arguments as a dict. Raises ValueError when the model wrote something that is not a JSON object."""
        try:
            value = json.loads(self.arguments or "{}")
        except ValueError as error:
            raise ValueError(f"The arguments of the call to {self.name!r} are not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"The arguments of the call to {self.name!r} are not a JSON object.")
        return value


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    ``content`` is a string, a tuple of parts, or None for an assistant turn that only calls tools. ``tool_call_id``
    belongs to role ``"tool"``: which call this is the result of. ``reasoning`` is kept for the caller and not sent
    back, because most providers refuse it; where one asks for it, ``extra={"reasoning_content": ...}`` sends it.
    """

    role: Role
    content: str | tuple[Part, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = field(default=(), kw_only=True)
    tool_call_id: str | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    reasoning: str | None = field(default=None, kw_only=True)
    extra: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    @property
    def text(self) -> str:
        """All text of the message; images and what is no text count for nothing."""
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))


# -- what a request may ask for ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that the model may call. ``parameters`` is the JSON schema of its arguments (an object).

    ``function`` is the Python function it was made from, where it was; asyncmodels never calls it. ``extra`` is passed
    to the provider beside it (``cache_control``).
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    function: Callable[..., Any] | None = field(default=None, kw_only=True, compare=False)
    strict: bool | None = field(default=None, kw_only=True)
    extra: Mapping[str, Any] | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseFormat:
    """What the content must be: any JSON (``schema`` is None) or JSON that satisfies ``schema``.

    ``parse`` turns the content into ``Response.parsed`` and raises ValueError when it does not satisfy the format.
    """

    name: str = "response"
    schema: Mapping[str, Any] | None = None
    strict: bool = True
    parse: Callable[[str], Any] = field(default=json.loads, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Regex:
    """The whole content must match ``pattern``."""

    pattern: str


@dataclass(frozen=True, slots=True)
class EBNF:
    """The content must be a sentence of ``grammar`` (EBNF or Lark syntax)."""

    grammar: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The content must be exactly one of ``options``."""

    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JSONSchema:
    """The content must be JSON that satisfies ``schema``."""

    schema: Mapping[str, Any]


Grammar: TypeAlias = Regex | EBNF | Choice | JSONSchema


@dataclass(frozen=True, slots=True)
class Score:
    """A given continuation whose log-probability is asked for, instead of an answer.

    It continues ``prompt``, a text as it is or token ids; or, with None, the messages of its request as the model's
    chat template puts them. Either may be token ids (a tuple) where the model's tokens are known to the caller. What a
    text ends with in spaces is scored together with the continuation, and the first token of a text whose prompt is
    empty is scored as the first of a document.
    """

    continuation: str | tuple[int, ...]
    prompt: str | tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request, as it travels down the chain. None means "unset: the backend's own default".

    Built by ``Model.generate`` from what the caller wrote; policies read it and pass it on.
    """

    messages: tuple[Message, ...]
    stop_sequences: tuple[str, ...] = ()
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logprobs: int | None = None
    """How many alternatives to report with each token's log-probability; 0 reports the chosen token alone."""
    tools: tuple[Tool, ...] = ()
    tool_choice: str | None = None
    """``"auto"``, ``"none"``, ``"required"`` or the name of one tool."""
    response_format: ResponseFormat | None = None
    grammar: Grammar | None = None
    score: Score | None = None
    """What is to be scored instead of answered; the response's ``logprobs`` are those of its tokens."""
    timeout: float | None = None
    """Seconds for the whole call, retries and waiting included."""
    attempt_timeout: float | None = None
    """Seconds for one attempt, once it was let through to the backend."""
    idle_timeout: float | None = None
    """Seconds of silence allowed inside a stream; ``generate`` has no use for it."""
    priority: int = 0
    """Higher goes first wherever requests wait."""
    agent: str | None = None
    """Who asks: the unit of fairness."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The caller's own notes; never sent."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What only this provider understands; sent as it is."""


# -- what comes back --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer. ``cached_tokens`` are part of the input, ``reasoning_tokens`` of the output."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            _sum(self.cached_tokens, other.cached_tokens),
            _sum(self.reasoning_tokens, other.reasoning_tokens),
        )


def _sum(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else a + b


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability (natural logarithm) of one token, and of the ``top`` alternatives at its place."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """What a provider says of one of its limits: ``limit`` per ``window`` seconds, of which ``remaining`` are left.

    After ``reset`` seconds, counted from the answer, the whole limit is there again. None is what it did not say; most
    providers count by the minute and say nothing of the ``window``.
    """

    limit: int | None = None
    remaining: int | None = None
    reset: float | None = None
    window: float | None = None


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class RateLimits:
    """What a provider says of its rate limits beside an answer, or beside its refusal to answer; None: nothing.

    ``tokens`` are those of input and output together.
    """

    # No plain defaults: headers are read when the first of these is looked for and not found, see remote/limit_headers.
    requests: Allowance | None = field(default_factory=_nothing)
    tokens: Allowance | None = field(default_factory=_nothing)
    input_tokens: Allowance | None = field(default_factory=_nothing)
    output_tokens: Allowance | None = field(default_factory=_nothing)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds: waiting for a slot, until the first token, being served, and all together."""

    queued: float = 0.0
    first_token: float | None = None
    service: float | None = None
    total: float | None = None


@dataclass(frozen=True, kw_only=True)
class Response:
    """A whole answer. ``usage`` is None where the provider said nothing; ``raw`` is its own object.

    Most providers tell the usage at the end of a stream, which does not come when a stop sequence was found here.

    ``extra`` is what the provider wants to have back in the next request: it becomes the ``extra`` of the message when
    the response is put into a conversation.
    """

    content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    model: str | None = None
    id: str | None = None
    parsed: Any = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    timing: Timing = Timing()
    attempts: int = 1
    cached: bool = False
    rate_limits: RateLimits | None = field(default=None, repr=False, compare=False)
    """What was left of the provider's limits when it answered, where it said so."""
    extra: Mapping[str, Any] | None = field(default=None, repr=False)
    raw: Any = field(default=None, repr=False, compare=False)

    def as_delta(self) -> Delta:
        """The whole answer as the one and last piece of a stream."""
        return Delta(
            content=self.content or "",
            reasoning=self.reasoning or "",
            tool_calls=tuple(
                ToolCallDelta(index, call.id, call.name, call.arguments, extra=call.extra)
                for index, call in enumerate(self.tool_calls)
            ),
            finish_reason=self.finish_reason,
            usage=self.usage,
            logprobs=self.logprobs or (),
            model=self.model,
            id=self.id,
            timing=self.timing,
            attempts=self.attempts,
            cached=self.cached,
            rate_limits=self.rate_limits,
            extra=self.extra,
        )

    def __str__(self) -> str:
        return self.content or ""


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A fragment of the tool call number ``index``; ``arguments`` is the piece to append."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    extra: Mapping[str, Any] | None = field(default=None, kw_only=True, repr=False)


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A piece of an answer. The last one of a stream carries ``finish_reason``, and usage where it is known."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    model: str | None = None
    id: str | None = None
    timing: Timing | None = None
    attempts: int | None = None
    cached: bool = False
    rate_limits: RateLimits | None = field(default=None, repr=False, compare=False)
    """What was left of the provider's limits when the answer began; it comes with the first piece."""
    extra: Mapping[str, Any] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.content


class ResponseBuilder:
    """Adds Deltas up to the Response that ``generate`` would have returned.

    A later value replaces an earlier one; text is appended; tool calls are told apart by their index.
    """

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._calls: dict[int, _ToolCallBuilder] = {}
        self._finish_reason: FinishReason | None = None
        self._usage: Usage | None = None
        self._model: str | None = None
        self._id: str | None = None
        self._timing = Timing()
        self._attempts = 1
        self._cached = False
        self._rate_limits: RateLimits | None = None
        self._extra: Mapping[str, Any] | None = None

    def add(self, delta: Delta) -> None:
        if delta.content:
            self._content.append(delta.content)
        if delta.reasoning:
            self._reasoning.append(delta.reasoning)
        if delta.logprobs:
            self._logprobs.extend(delta.logprobs)
        for call in delta.tool_calls:
            self._calls.setdefault(call.index, _ToolCallBuilder()).add(call)
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
        if delta.usage is not None:
            self._usage = delta.usage
        if delta.model is not None:
            self._model = delta.model
        if delta.id is not None:
            self._id = delta.id
        if delta.timing is not None:
            self._timing = delta.timing
        if delta.attempts is not None:
            self._attempts = delta.attempts
        if delta.cached:
            self._cached = True
        if delta.rate_limits is not None:
            self._rate_limits = delta.rate_limits
        if delta.extra is not None:
            self._extra = delta.extra

    def response(self) -> Response:
        calls = tuple(self._calls[index].call(index) for index in sorted(self._calls))
        content = "".join(self._content)
        return Response(
            content=content if content or not calls else None,
            tool_calls=calls,
            reasoning="".join(self._reasoning) or None,
            finish_reason=self._finish_reason,
            usage=self._usage,
            model=self._model,
            id=self._id,
            logprobs=tuple(self._logprobs) or None,
            timing=self._timing,
            attempts=self._attempts,
            cached=self._cached,
            rate_limits=self._rate_limits,
            extra=self._extra,
        )


class _ToolCallBuilder:
    def __init__(self) -> None:
        self.id = ""
        self.name = ""
        self.arguments: list[str] = []
        self.extra: Mapping[str, Any] | None = None

    def add(self, delta: ToolCallDelta) -> None:
        self.id = delta.id or self.id
        self.name = delta.name or self.name
        self.arguments.append(delta.arguments)
        self.extra = delta.extra or self.extra

    def call(self, index: int) -> ToolCall:
        # Some servers never send an id; an empty one would fuse parallel calls, so each gets its place as its name.
        return ToolCall(self.id or f"call_{index}", self.name, "".join(self.arguments), extra=self.extra)
