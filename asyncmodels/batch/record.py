"""What a journal keeps of one item: plain values, enough to go on from and to report on, and nothing secret."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any, NamedTuple

from asyncmodels.answers import decode, encode
from asyncmodels.batch.item import Item
from asyncmodels.errors import ResponseFormatError
from asyncmodels.identity import canonical, question
from asyncmodels.messages import load_images, needs_loading
from asyncmodels.types import Request, Response, Timing, evolve

__all__ = ["Asked", "Questions", "Record", "Sample", "recorded", "sound"]


class Record(NamedTuple):
    """One item of a journal. ``None`` is what does not exist, or what nobody said; times are in seconds."""

    id: str
    place: int
    """The index of the item in the input."""
    key: str | None
    """The digest of the question and of who was asked it; None where nobody can say whether two are the same."""
    question: str | None
    """The request as JSON, images by their digests; None for an input that could not be read."""
    answer: str | None
    """The response as JSON; for an error the answer that was of no use, where there is one."""
    finish_reason: str | None
    error: str | None
    """The name of the error's class."""
    error_text: str | None
    error_status: int | None
    attempts: int
    began: float
    """Since 1970, when it was taken up."""
    seconds: float
    """From then until it ended."""
    queued: float | None
    service: float | None
    first_token: float | None
    input_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    reasoning_tokens: int | None
    model: str | None
    """Which one answered, in the provider's words."""
    agent: str | None
    cached: bool
    """Whether a cache answered."""

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def unread(self) -> bool:
        """Whether it is the error of an input that could not be read, or compared: that takes no answer's place."""
        return self.key is None and self.error is not None

    @property
    def tree(self) -> Any:
        """The question as dicts and lists; None where there is none."""
        return None if self.question is None else json.loads(self.question)

    def response(self) -> Response | None:
        """The answer; None where there is none. Raises ValueError where it was damaged."""
        if self.answer is None:
            return None
        timing = Timing(queued=self.queued or 0.0, first_token=self.first_token, service=self.service)
        return decode(self.answer.encode("utf-8"), attempts=self.attempts, cached=bool(self.cached), timing=timing)


class Sample(NamedTuple):
    """What a run did at one moment."""

    at: float
    """Seconds since 1970."""
    in_flight: int
    limit: int | None
    """How many calls the model's Concurrency let in at once, where it has one."""
    refused: int | None = None
    """How many calls the server had sent away since the run began."""
    spent: float | None = None
    """What the model's Budget had counted since the run began, in its ``currency``; None without one."""
    currency: str | None = None


class Asked(NamedTuple):
    """A question as a journal writes it down."""

    key: str | None
    text: str | None


class Questions:
    """Makes the keys of one journal, in which ``who`` is asked."""

    def __init__(self, who: Any) -> None:
        self._prefix = sha256(canonical(who))

    def asked(self, request: Request) -> Asked:
        """Reads the images of the request, where it has any."""
        try:
            if needs_loading(request.messages):
                request = evolve(request, messages=load_images(request.messages))
            tree = question(request)
            text = canonical(tree)
        except RecursionError:
            return _UNSAID
        except (TypeError, ValueError, OSError):  # of values that JSON does not have, or an image that cannot be read
            return Asked(None, _shown(request))
        said = text.decode("utf-8")
        return Asked(self.key(said), said)

    def key(self, text: str) -> str:
        """Of a question that is written down already."""
        key = self._prefix.copy()
        key.update(text.encode("utf-8", "replace"))
        return key.hexdigest()[:32]


_UNSAID = Asked(None, None)


def _shown(request: Request) -> str | None:
    """The question as far as it can be shown."""
    try:
        return json.dumps(question(request), default=lambda value: f"<{type(value).__name__}>")
    except (TypeError, ValueError, RecursionError):
        return None


def recorded(item: Item, asked: Asked | None) -> Record:
    """``asked`` is None for an input that was no request."""
    error, request = item.error, item.request
    response = item.response
    if isinstance(error, ResponseFormatError):
        response = error.response  # it was paid for, and is shown in reports
    answer = None
    if response is not None:
        try:
            answer = encode(response).decode("utf-8")
        except (TypeError, ValueError, RecursionError):
            # It came out of the run; what JSON cannot hold can only be asked again.
            if asked is not None:
                asked = Asked(None, asked.text)
    usage = None if response is None else response.usage
    timing = None if response is None else response.timing
    attempts = getattr(error, "attempts", None) if response is None else response.attempts
    return Record(
        sound(item.id),
        item.index,
        None if asked is None else asked.key,
        None if asked is None else asked.text,
        answer,
        None if response is None else _text(response.finish_reason),
        None if error is None else type(error).__name__,
        None if error is None else sound(str(error)),
        None if error is None else _whole(getattr(error, "status", None)),
        1 if (counted := _whole(attempts)) is None else counted,
        item.began,
        item.seconds,
        None if timing is None else timing.queued,
        None if timing is None else timing.service,
        None if timing is None else timing.first_token,
        None if usage is None else _whole(usage.input_tokens),
        None if usage is None else _whole(usage.output_tokens),
        None if usage is None else _whole(usage.cached_tokens),
        None if usage is None else _whole(usage.reasoning_tokens),
        None if response is None else _text(response.model),
        None if request is None else _text(request.agent),
        False if response is None else bool(response.cached),
    )


# Errors and answers may be anybody's: what is not what it should be must not keep the rest from being written down.


def _text(value: object) -> str | None:
    return sound(value) if isinstance(value, str) else None


def _whole(value: object) -> int | None:
    """Up to what fits into a column."""
    return int(value) if isinstance(value, int) and -(2**63) <= value < 2**63 else None


def sound(text: str) -> str:
    """``text`` with the halves of characters that no file can hold written out."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")
