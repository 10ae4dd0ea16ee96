"""What a provider may charge for a call that did not end with a usage."""

from __future__ import annotations

from typing import Literal, TypeAlias

from asyncmodels.errors import (
    AuthenticationError,
    ConfigurationError,
    ConflictError,
    ContentFilterError,
    ContextLengthError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    QueueFullError,
    RateLimitError,
    ServerError,
    ServerTimeoutError,
    TransportError,
)
from asyncmodels.types import Delta, Response

__all__ = ["Charge", "charge_for", "size_of"]

Charge: TypeAlias = Literal["nothing", "input", "everything"]


def charge_for(error: BaseException, *, sent: bool) -> Charge:
    """What a provider may charge for a call that ended in ``error`` before anything of an answer was seen."""
    if not sent or (isinstance(error, TransportError) and not error.sent):
        return "nothing"
    if isinstance(error, ContentFilterError | ContextLengthError):
        return "input"  # it was read before it was refused, and some providers bill that
    if isinstance(error, ServerError):
        # Without a status it came inside of an answer that had begun.
        return "everything" if error.status is None or isinstance(error, ServerTimeoutError) else "nothing"
    return "nothing" if isinstance(error, _REFUSALS) else "everything"


_REFUSALS = (
    ConfigurationError,
    InvalidRequestError,
    AuthenticationError,
    PermissionDeniedError,
    NotFoundError,
    ConflictError,
    RateLimitError,
    QueueFullError,
)


def size_of(seen: Response | Delta) -> int:
    """As many tokens as this can be at most."""
    texts = [seen.content or "", seen.reasoning or ""]
    for call in seen.tool_calls:
        texts += [call.name or "", call.arguments]
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
