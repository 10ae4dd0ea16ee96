"""One item of a run: what was asked, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncmodels.types import Request, Response

__all__ = ["Entry", "Item"]


@dataclass(frozen=True, slots=True)
class Entry:
    """An input that was read: a request, or the error that says why it is none."""

    index: int
    """Its place in the input, from 0."""
    id: str
    request: Request | None
    error: Exception | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What came of one input: a ``response`` or an ``error``, never both."""

    index: int
    """Its place in the input, from 0."""
    id: str
    """The ``id`` that the input has, or its index."""
    request: Request | None = field(repr=False)
    """None where the input could not be read as one."""
    response: Response | None = None
    error: Exception | None = None
    began: float = 0.0
    """When it was taken up, in seconds since 1970; for what is reused, when it was asked."""
    seconds: float = 0.0
    """From when it was taken up until it ended, waiting and retries included; 0 for what was reused."""
    reused: bool = False
    """Whether the response comes from the journal of an earlier run."""

    @property
    def ok(self) -> bool:
        """Whether there is a response."""
        return self.error is None

    def unwrap(self) -> Response:
        """The response; raises the error where there is none."""
        if self.error is not None:
            raise self.error
        assert self.response is not None  # noqa: S101  # it is one or the other
        return self.response
