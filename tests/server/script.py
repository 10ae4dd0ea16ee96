"""What a test tells the server to do: a sequence of Answers, one per request, the last one for all that follow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

__all__ = ["Answer", "Fault"]

Fault: TypeAlias = Literal[
    "close",  # closes the connection without an answer
    "reset",  # the same with a TCP reset
    "hang",  # never answers
    "malformed",  # answers with something that is not HTTP
    "half_head",  # closes in the middle of the head
    "short",  # announces a longer body than it sends, then closes
    "cut",  # a chunked body without its end, then closes
    "bad_chunk",  # a chunked body with a chunk of no size
    "reset_in_body",  # a TCP reset in the middle of the body
    "hang_in_body",  # falls silent in the middle of the body
    "drip",  # a good answer, byte by byte
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer. A body that asks for ``"stream": true`` gets its completion as server-sent events.

    ``body`` replaces the completion by any text, or with ``base64`` by what that decodes to, and ``size`` by so many
    bytes; ``events`` replaces the ``data:`` of each event. ``pieces`` is how ``content`` is cut up in a stream. With
    ``echo`` the content is that of the last message, with ``obey`` words are counted as tokens and ``max_tokens`` is
    heeded. ``reasoning`` are the paragraphs that the Responses API shows of it. ``delay`` comes before the first byte,
    ``interval`` between the events of a stream, both in seconds. In a stream, the body faults strike after ``after``
    events, or when all pieces were sent.
    """

    content: str | None = "Hello from the test server."
    tool_calls: Sequence[Mapping[str, Any]] = ()
    reasoning: Sequence[str] = ()
    finish_reason: str = "stop"
    usage: Mapping[str, int] | None = None
    echo: bool = False
    obey: bool = False
    status: int = 200
    headers: Sequence[tuple[str, str]] = ()
    body: str | None = None
    base64: bool = False
    size: int | None = None
    pieces: Sequence[str] | None = None
    events: Sequence[str] | None = None
    done: bool = True
    delay: float = 0.0
    interval: float = 0.0
    fault: Fault | None = None
    after: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Answer:
        return cls(**data)
