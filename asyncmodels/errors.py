"""Every error that asyncmodels raises, typed by the decision a caller can take.

AsyncModelsError
├── ConfigurationError           the program must change before any call can work
│   ├── MissingKeyError          no API key was given or found in the environment
│   ├── MissingExtraError        an optional dependency is not installed      (also ImportError)
│   ├── UnknownSchemeError       load("scheme:name") knows no such scheme     (also LookupError)
│   ├── ModelLoadError           the weights, folder or tokenizer cannot be loaded
│   └── EventLoopError           called without a running asyncio loop, or from the wrong one
├── InvalidRequestError          this request can never succeed as it stands  (also ValueError)
│   ├── UnsupportedError         the backend cannot do what a parameter asks for
│   ├── ContextLengthError       the prompt does not fit; carries .requested and .limit
│   └── ContentFilterError       the provider refused the prompt
├── AuthenticationError          401: the key is wrong
├── PermissionDeniedError        403: the key is right and may not do this
├── NotFoundError                404: no such model or endpoint
├── ConflictError                409: retry
├── RateLimitError               429: wait (see .retry_after), then retry
│   └── QuotaExceededError       429 that waiting does not mend: the account is out of credit
├── ServerError                  5xx: the provider failed; retry
│   ├── ServerTimeoutError       408, 504
│   └── OverloadedError          503, 529
├── TransportError               the bytes did not get through; .sent tells whether the server may have acted
│   ├── ConnectError             no connection, nothing was sent
│   │   ├── DNSError             the host name does not resolve
│   │   ├── TLSError             the certificate or the handshake was refused
│   │   └── ConnectTimeoutError  no connection in time                        (also TimeoutError)
│   ├── ConnectionLostError      closed or reset after the request may have been sent
│   ├── ReadTimeoutError         connected, sent, and no answer in time       (also TimeoutError)
│   ├── TruncatedResponseError   the body or the stream ended before its end
│   └── ProtocolError            what came back is not HTTP
├── InvalidResponseError         an answer arrived and is not what was promised (HTML, wrong shape)
│   └── ResponseFormatError      the content does not satisfy response_format; carries .response
├── StreamError                  the provider reported an error inside a running stream
├── DeadlineError                a limit of the caller's own ran out          (also TimeoutError)
│   ├── CallTimeoutError         timeout: the whole call, retries and waiting included
│   ├── AttemptTimeoutError      attempt_timeout: one attempt
│   └── IdleTimeoutError         idle_timeout: silence inside a stream
├── BudgetExceededError          the call could cost more than is left; it was not made
├── CircuitOpenError             the endpoint fails too often; nothing was sent, see .retry_after
├── RepeatedFailureError         this request fails in the same way every time, while others are answered
├── LimitStoreError              the store of a shared rate limit cannot be used just now; nothing was sent
├── BatchError                   a provider's batch ended without an answer; carries .state and .batch
├── EngineError                  a local engine could not serve the request
│   ├── QueueFullError           admission refused: too many requests or tokens are queued
│   └── EngineDeadError          the engine's thread died; carries the cause
├── WorkerDiedError              the process elsewhere that had the request died, and so did the next one
├── RunError                     a run over many inputs ended before its time
│   ├── RunStoppedError          too many of its items failed
│   └── JournalError             its journal cannot be used, or is another run's
└── ClosedError                  the model was closed
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from asyncmodels.types import RateLimits, Response

__all__ = [
    "AsyncModelsError",
    "AttemptTimeoutError",
    "AuthenticationError",
    "BatchError",
    "BudgetExceededError",
    "CallTimeoutError",
    "CircuitOpenError",
    "ClosedError",
    "ConfigurationError",
    "ConflictError",
    "ConnectError",
    "ConnectTimeoutError",
    "ConnectionLostError",
    "ContentFilterError",
    "ContextLengthError",
    "DNSError",
    "DeadlineError",
    "EngineDeadError",
    "EngineError",
    "EventLoopError",
    "IdleTimeoutError",
    "InvalidRequestError",
    "InvalidResponseError",
    "JournalError",
    "LimitStoreError",
    "MissingExtraError",
    "MissingKeyError",
    "ModelLoadError",
    "NotFoundError",
    "OverloadedError",
    "PermissionDeniedError",
    "ProtocolError",
    "QueueFullError",
    "QuotaExceededError",
    "RateLimitError",
    "ReadTimeoutError",
    "RepeatedFailureError",
    "ResponseFormatError",
    "RunError",
    "RunStoppedError",
    "ServerError",
    "ServerTimeoutError",
    "StreamError",
    "TLSError",
    "TransportError",
    "TruncatedResponseError",
    "UnknownSchemeError",
    "UnsupportedError",
    "WorkerDiedError",
]


class AsyncModelsError(Exception):
    """The base of all errors of this library; catch it to catch them all.

    Every error carries, where it is known:

    ``status``
        the HTTP status of the answer.
    ``retry_after``
        how many seconds the server asked to wait.
    ``request_id``
        the provider's id of the request, for its support.
    ``code``
        the provider's own error code, such as ``"context_length_exceeded"``.
    ``attempts``
        how many attempts were made before this error was let through.
    ``tried``
        for a call that several models were asked (``Fallback``, ``Route``): the name and the error of each other one.
    ``rate_limits``
        what the provider said of its rate limits beside its refusal.

    ``retryable`` says whether the same request can succeed a moment later.
    """

    retryable: bool = False
    tried: tuple[tuple[str, Exception], ...] = ()
    rate_limits: RateLimits | None = None

    def __init__(
        self,
        message: str = "",
        *,
        status: int | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
        code: str | None = None,
        attempts: int = 1,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.retry_after = retry_after
        self.request_id = request_id
        self.code = code
        self.attempts = attempts

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors with keyword-only data do not survive pickling by args alone; process pools need them to.
        return (_rebuild, (type(self), self.args, self.__dict__.copy()))


def _rebuild(cls: type[AsyncModelsError], args: tuple[Any, ...], state: dict[str, Any]) -> AsyncModelsError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


# -- the program must change ------------------------------------------------------------------------------------------


class ConfigurationError(AsyncModelsError):
    """The program or its environment must change before any call can work."""


class MissingKeyError(ConfigurationError):
    """Raised when a provider needs an API key and none was given or found in the environment."""


class MissingExtraError(ConfigurationError, ImportError):
    """Raised when an optional dependency is missing; the message names the ``pip install`` that mends it."""


class UnknownSchemeError(ConfigurationError, LookupError):
    """Raised by ``load("scheme:name")`` for a scheme that no row of the registry has."""


class ModelLoadError(ConfigurationError):
    """Raised when a local model cannot be loaded: no such folder, no weights, an unknown architecture."""


class EventLoopError(ConfigurationError):
    """Raised when there is no running asyncio loop (trio, or none), or the sync face would wait for itself."""


# -- the request must change ------------------------------------------------------------------------------------------


class InvalidRequestError(AsyncModelsError, ValueError):
    """This request can never succeed as it stands: a bad parameter, message, tool or schema; or a 400 or 422."""


class UnsupportedError(InvalidRequestError):
    """Raised before anything is sent when the backend cannot do what a parameter asks for."""


class ContextLengthError(InvalidRequestError):
    """The prompt (and what it asks to generate) is longer than the model's context.

    ``requested`` and ``limit`` are in tokens, None where the provider gave no numbers.
    """

    def __init__(
        self, message: str = "", *, requested: int | None = None, limit: int | None = None, **data: Any
    ) -> None:
        super().__init__(message, **data)
        self.requested = requested
        self.limit = limit


class ContentFilterError(InvalidRequestError):
    """The provider refused the prompt on grounds of its content policy."""


# -- the provider said no ---------------------------------------------------------------------------------------------


class AuthenticationError(AsyncModelsError):
    """The provider does not accept the key (401)."""


class PermissionDeniedError(AsyncModelsError):
    """The key is valid and may not do this (403)."""


class NotFoundError(AsyncModelsError):
    """The model or the endpoint does not exist (404)."""


class ConflictError(AsyncModelsError):
    """The provider asks to try again because of a conflicting request (409)."""

    retryable = True


class RateLimitError(AsyncModelsError):
    """Too many requests or tokens (429); ``retry_after`` says how long to wait where the server said it."""

    retryable = True


class QuotaExceededError(RateLimitError):
    """A 429 that waiting does not mend: the account is out of credit."""

    retryable = False


class ServerError(AsyncModelsError):
    """The provider failed (5xx)."""

    retryable = True


class ServerTimeoutError(ServerError):
    """The provider gave up waiting for itself or for us (408, 504)."""


class OverloadedError(ServerError):
    """The provider is overloaded (503, 529)."""


# -- the bytes did not get through ------------------------------------------------------------------------------------


class TransportError(AsyncModelsError):
    """The bytes did not get through.

    ``sent`` is False when the server cannot have seen the request, True when it may have acted on it.
    """

    retryable = True
    sent: ClassVar[bool] = True


class ConnectError(TransportError):
    """No connection could be made (refused, unreachable, proxy); nothing was sent."""

    sent = False


class DNSError(ConnectError):
    """The host name does not resolve."""


class TLSError(ConnectError):
    """The TLS handshake failed, most often because the certificate is not trusted."""

    retryable = False


class ConnectTimeoutError(ConnectError, TimeoutError):
    """No connection was made in time; nothing was sent."""


class ConnectionLostError(TransportError):
    """The connection was closed or reset when the request may already have been sent."""


class ReadTimeoutError(TransportError, TimeoutError):
    """The request was sent and no byte of the answer came in time."""


class TruncatedResponseError(TransportError):
    """The body, or the stream, ended before its end."""


class ProtocolError(TransportError):
    """What came back is not HTTP."""


# -- the answer is not what was promised ------------------------------------------------------------------------------


class InvalidResponseError(AsyncModelsError):
    """An answer with a good status arrived that is not what the API promises: HTML, no JSON, a wrong shape."""


class ResponseFormatError(InvalidResponseError):
    """The content does not satisfy ``response_format``; ``response`` is the whole answer."""

    def __init__(self, message: str = "", *, response: Response | None = None, **data: Any) -> None:
        super().__init__(message, **data)
        self.response = response


class StreamError(AsyncModelsError):
    """The provider reported an error inside a stream that had begun with a good status."""

    retryable = True


# -- the caller's own limits ------------------------------------------------------------------------------------------


class DeadlineError(AsyncModelsError, TimeoutError):
    """A time limit of the caller's own ran out."""


class CallTimeoutError(DeadlineError):
    """``timeout`` ran out: the whole call with its retries and its waiting."""


class AttemptTimeoutError(DeadlineError):
    """``attempt_timeout`` ran out for one attempt; another may be made."""

    retryable = True


class IdleTimeoutError(DeadlineError):
    """A stream was silent for longer than ``idle_timeout``."""

    retryable = True


class BudgetExceededError(AsyncModelsError):
    """Raised before a call is made that could cost more than its budget has left.

    ``needed`` is what the call could cost at most, ``left`` what the budget has, in ``unit``: a currency or "tokens".
    """

    def __init__(
        self,
        message: str = "",
        *,
        needed: float | None = None,
        left: float | None = None,
        unit: str | None = None,
        **data: Any,
    ) -> None:
        super().__init__(message, **data)
        self.needed = needed
        self.left = left
        self.unit = unit


# -- what failed too often --------------------------------------------------------------------------------------------


class CircuitOpenError(AsyncModelsError):
    """Raised by ``Breaker`` before anything is sent to an endpoint that has failed too often just now.

    ``retry_after`` says after how many seconds it is tried again. Not retryable: whoever has another endpoint asks that
    one at once.
    """


class RepeatedFailureError(AsyncModelsError):
    """Raised by ``Retry`` for a request that failed in the same way every time, while others were answered.

    The cause is the last failure, where it happened in this call. Without one nothing was sent, because the request has
    failed before; ``retry_after`` says after how many seconds it is tried again.
    """


class LimitStoreError(AsyncModelsError):
    """Raised by ``RateLimit(shared=...)`` before anything is sent when the store that holds the limit cannot be used
    just now; ``__cause__`` says why. Whoever has another model asks that one."""

    retryable = True


class BatchError(AsyncModelsError):
    """A provider's batch ended without an answer to this request, or cannot be gone on with.

    ``state`` says how: "failed" (the provider refused the file), "expired", "cancelled", "missing" (it answered others
    and lost this one) or "unknown". ``batch`` is the provider's id of the batch, None where there is none.
    """

    def __init__(self, message: str = "", *, state: str | None = None, batch: str | None = None, **data: Any) -> None:
        super().__init__(message, **data)
        self.state = state
        self.batch = batch


# -- local engines, lifetimes -----------------------------------------------------------------------------------------


class EngineError(AsyncModelsError):
    """A local engine could not serve the request."""


class QueueFullError(EngineError):
    """Admission was refused because too many requests, or tokens, are queued already."""

    retryable = True


class EngineDeadError(EngineError):
    """The engine's thread died while the request was with it; ``__cause__`` says why."""


class ClosedError(AsyncModelsError):
    """The model, pool or engine was closed."""


class WorkerDiedError(AsyncModelsError):
    """The worker of an executor that had the request died, and so did the one that it was sent to again; it may be what
    kills them. ``__cause__`` says why the second did."""


class RunError(AsyncModelsError):
    """A run over many inputs ended before its time. What was answered until then is not lost."""


class RunStoppedError(RunError):
    """Too many items of a run failed, as ``max_errors`` counts; the last of their errors is the cause."""


class JournalError(RunError):
    """The journal of a run cannot be read or written, or belongs to another run or another process."""
