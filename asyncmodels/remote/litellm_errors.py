"""What litellm raises as errors of ours.

litellm's own classes are half the truth: it finds many of them by searching the message for words and numbers, gives
a lost connection the status 500, and leaves headers and codes behind. But every exception keeps those it was made
from, so that the provider's own answer, or what happened to the connection, is read from the bottom of that chain.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import httpx2
import orjson

from asyncmodels.errors import (
    AsyncModelsError,
    AuthenticationError,
    ConfigurationError,
    ConflictError,
    ConnectError,
    ConnectionLostError,
    ConnectTimeoutError,
    ContentFilterError,
    ContextLengthError,
    DNSError,
    InvalidRequestError,
    InvalidResponseError,
    MissingExtraError,
    MissingKeyError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    ProtocolError,
    QuotaExceededError,
    RateLimitError,
    ReadTimeoutError,
    ResponseFormatError,
    ServerError,
    ServerTimeoutError,
    StreamError,
    TLSError,
    TruncatedResponseError,
    UnsupportedError,
)
from asyncmodels.remote.answer import without
from asyncmodels.remote.litellm_wire import ReportedError
from asyncmodels.remote.status import error_from_body, error_from_response

__all__ = ["SECRET_NAME", "error_from_litellm", "known_secrets"]

# What litellm says of a request, for where the provider itself said nothing. By name, because not every release has
# every class; the nearest base class counts.
_KINDS: dict[str, type[AsyncModelsError]] = {
    "APIConnectionError": ConnectionLostError,
    "APIError": ServerError,
    "APIResponseValidationError": InvalidResponseError,
    "AuthenticationError": AuthenticationError,
    "BadGatewayError": ServerError,
    "BadRequestError": InvalidRequestError,
    "BlockedPiiEntityError": ContentFilterError,
    "BudgetExceededError": QuotaExceededError,
    "ConflictError": ConflictError,
    "ContentPolicyViolationError": ContentFilterError,
    "ContextWindowExceededError": ContextLengthError,
    "GuardrailRaisedException": ContentFilterError,
    "ImportError": MissingExtraError,
    "InternalServerError": ServerError,
    "InvalidRequestError": InvalidRequestError,
    "JSONSchemaValidationError": ResponseFormatError,
    "NotFoundError": NotFoundError,
    "PaymentRequiredError": QuotaExceededError,
    "PermissionDeniedError": PermissionDeniedError,
    "RateLimitError": RateLimitError,
    "RejectedRequestError": ContentFilterError,
    "RouterRateLimitError": RateLimitError,
    "RouterRateLimitErrorBasic": RateLimitError,
    "ServiceUnavailableError": OverloadedError,
    "Timeout": ServerTimeoutError,
    "UnprocessableEntityError": InvalidRequestError,
    "UnsupportedParamsError": UnsupportedError,
}

# What happened to the connection: the operating system's errors, then aiohttp's, then httpx's.
_CONNECTION: dict[str, type[AsyncModelsError]] = {
    "gaierror": DNSError,
    "ConnectionRefusedError": ConnectError,
    "ConnectionResetError": ConnectionLostError,
    "BrokenPipeError": ConnectionLostError,
    "SSLCertVerificationError": TLSError,
    "BadHttpMessage": ProtocolError,
    "ClientConnectorDNSError": DNSError,
    "ClientConnectorCertificateError": TLSError,
    "ClientConnectorSSLError": TLSError,
    "ClientConnectorError": ConnectError,
    "ConnectionTimeoutError": ConnectTimeoutError,
    "ServerTimeoutError": ReadTimeoutError,
    "ServerDisconnectedError": ConnectionLostError,
    "ClientPayloadError": TruncatedResponseError,
    "ClientOSError": ConnectionLostError,
    "ConnectTimeout": ConnectTimeoutError,
    "ReadTimeout": ReadTimeoutError,
    "ConnectError": ConnectError,
    "ReadError": ConnectionLostError,
    "WriteError": ConnectionLostError,
    "RemoteProtocolError": ConnectionLostError,
    "TimeoutException": ReadTimeoutError,
    "APITimeoutError": ReadTimeoutError,
}
# A chunked body that breaks off is noticed by aiohttp's parser, which calls it bad HTTP.
_CONNECTION["TransferEncodingError"] = _CONNECTION["ContentLengthError"] = TruncatedResponseError

_WORDS: dict[type[AsyncModelsError], str] = {
    DNSError: "The host name does not resolve",
    ConnectError: "No connection could be made",
    TLSError: "The TLS handshake failed",
    ConnectTimeoutError: "No connection was made in time",
    ConnectionLostError: "The connection was lost before the answer was there",
    TruncatedResponseError: "The answer broke off",
    ProtocolError: "What came back is not HTTP",
    ReadTimeoutError: "No answer came in time",
}

# litellm stumbles over an answer that is not what it expects.
_STUMBLES = ("JSONDecodeError", "ValidationError", "AttributeError", "AssertionError", "KeyError", "IndexError")
_UNREADABLE = re.compile(r"(?i)invalid response|provider returned 'choices'")
_NO_KEY = re.compile(r"(?i)api_key client option must be set|missing (?:credentials|(?:\w+ )?api key)|no api key")
_PREFIX = re.compile(r"^(?:litellm\.\w+: |\w*(?:Error|Exception)(?: - |: ))+")
# What litellm's router adds for its own log.
_GROUPS = re.compile(r"\.? Received Model Group=.*", re.DOTALL)
_EXCERPT = 300
_MASK = "***"
# Shorter values are words, not secrets.
_SECRET_LENGTH = 8
SECRET_NAME = re.compile(r"(?i)(?:key|token|secret|password|credentials?)$")


def error_from_litellm(
    error: BaseException, secrets: Collection[str] = (), *, handled: BaseException | None = None
) -> AsyncModelsError:
    """The error of ours that ``error`` stands for, without ``secrets`` and those of the environment.

    The exceptions it was made from lose them as well, so that it can be raised ``from error``. ``handled`` is what was
    being handled already when litellm was called, which has nothing to do with it.
    """
    chain = list(_chain(error, handled))
    secrets = {*secrets, *known_secrets(os.environ)}
    _mask(chain, secrets)
    found = (
        _of_report(chain)
        or _of_answer(chain)
        or _of_connection(chain)
        or _of_stream(chain)
        or _of_router(error)
        or _of_stumble(chain)
        or _of_class(chain)
    )
    for secret in secrets:
        without(secret, found)
    return found


def known_secrets(values: Mapping[str, Any]) -> Iterator[str]:
    """The values whose names say that they are secret."""
    for name, value in values.items():
        if isinstance(value, str) and len(value) >= _SECRET_LENGTH and SECRET_NAME.search(name):
            yield value


def _chain(error: BaseException | None, handled: BaseException | None) -> Iterator[BaseException]:
    """``error`` and what it was made from, the outermost first."""
    seen = {id(handled)}
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        # An error in the middle of a stream is wrapped for litellm's router, and keeps the original beside it; that
        # one may come from the wrapper in turn.
        sources = (getattr(error, "original_exception", None), error.__cause__, error.__context__)
        error = next((made for made in sources if isinstance(made, BaseException) and id(made) not in seen), None)


def _names(error: BaseException) -> Iterator[str]:
    return (cls.__name__ for cls in type(error).__mro__)


# -- the provider's own answer ----------------------------------------------------------------------------------------


def _of_report(chain: list[BaseException]) -> AsyncModelsError | None:
    for error in chain:
        if isinstance(error, ReportedError):
            return error_from_body(
                error.reported, default=ServerError, request_id=error.request_id, error_type=error.error_type
            )
    return None


def _of_answer(chain: list[BaseException]) -> AsyncModelsError | None:
    for error in reversed(chain):
        status = getattr(error, "status_code", None)
        headers = _headers(error)
        if isinstance(status, int) and status >= 400 and headers:
            found = error_from_response(status, headers, _body(error))
            return _refined(found, chain, status, headers) if type(found) is InvalidRequestError else found
    return None


def _headers(error: BaseException) -> httpx2.Headers | None:
    """The headers that came with the answer; those that litellm makes up are empty."""
    for holder in (getattr(error, "response", None), error):
        headers = getattr(holder, "headers", None)
        if isinstance(headers, Mapping) and headers:
            return httpx2.Headers({str(name): str(value) for name, value in headers.items()})
    return None


def _body(error: BaseException) -> bytes:
    try:
        content = error.response.content  # type: ignore[attr-defined]  # where it has none, the except below
    except Exception:  # each HTTP package has its own error for a body that was not read
        content = None
    if isinstance(content, bytes) and content:
        return content
    body = getattr(error, "body", None)
    if isinstance(body, Mapping):
        return orjson.dumps(body if "error" in body else {"error": body}, default=str)
    message = getattr(error, "message", None)
    return (message if isinstance(message, str) else str(error)).encode()


# What litellm knows of the refusals of providers without codes, as the codes that stand for it.
_CODES: dict[type[AsyncModelsError], str] = {
    ContextLengthError: "context_length_exceeded",
    ContentFilterError: "content_policy_violation",
    QuotaExceededError: "insufficient_quota",
}


def _refined(
    found: AsyncModelsError, chain: list[BaseException], status: int, headers: httpx2.Headers
) -> AsyncModelsError:
    for error in chain:
        kind = _class_of(error)
        if kind in _CODES:
            message = found.message.partition(": ")[2] or found.message
            refined = error_from_response(
                status, headers, orjson.dumps({"error": {"message": message, "code": _CODES[kind]}})
            )
            refined.code = found.code
            return refined
    return found


# -- the rest ---------------------------------------------------------------------------------------------------------


def _of_connection(chain: list[BaseException]) -> AsyncModelsError | None:
    for error in reversed(chain):
        for name in _names(error):
            kind = _CONNECTION.get(name)
            if kind is not None:
                return kind(f"{_WORDS[kind]} ({type(error).__name__}: {_excerpt(str(error))}).")
    return None


def _of_stream(chain: list[BaseException]) -> AsyncModelsError | None:
    """An ``error`` object in the middle of a stream, as the openai package raises it."""
    for error in reversed(chain):
        body = getattr(error, "body", None)
        if isinstance(body, Mapping) and not hasattr(error, "status_code"):
            return error_from_body(body, default=StreamError)
    return None


def _of_router(error: BaseException) -> AsyncModelsError | None:
    """No deployment is left: all of them failed a moment ago."""
    if _class_of(error) is not RateLimitError or not isinstance(error, ValueError):
        return None
    cooldown = getattr(error, "cooldown_time", None)
    return RateLimitError(
        "All deployments of the model rest after failures.",
        retry_after=float(cooldown) if isinstance(cooldown, int | float) else None,
    )


def _of_stumble(chain: list[BaseException]) -> AsyncModelsError | None:
    message = _message(chain[0])
    if any("not JSON serializable" in str(error) for error in chain):
        return InvalidRequestError(f"The request cannot be written as JSON: {message}")
    if _class_of(chain[0]) not in (ServerError, ConnectionLostError, OverloadedError):
        return None
    if any(_breaks_off(error) for error in chain):
        return TruncatedResponseError("The answer broke off: it is the beginning of a JSON object.")
    stumbled = any(name in _STUMBLES for error in chain[1:] for name in _names(error))
    if stumbled or any(_UNREADABLE.search(str(error)) for error in chain):
        return InvalidResponseError(f"The answer is not what litellm expects: {message}")
    return None


def _breaks_off(error: BaseException) -> bool:
    # Where litellm has a connection of its own, this is all that is left of how the body ended.
    text = getattr(error, "doc", None)
    return isinstance(text, str) and text.lstrip().startswith("{") and not text.rstrip().endswith("}")


def _of_class(chain: list[BaseException]) -> AsyncModelsError:
    error = next((error for error in chain if "MidStreamFallbackError" not in _names(error)), chain[0])
    message = _message(error)
    kind = _class_of(error)
    status = getattr(error, "status_code", None)
    if kind is None:
        return AsyncModelsError(f"litellm failed with {type(error).__name__}: {message}")
    if kind in (AuthenticationError, ServerError) and _NO_KEY.search(message):
        return MissingKeyError(f"litellm finds no API key: {message}")
    if issubclass(kind, ConfigurationError):
        return kind(f"litellm needs another package for this model: {message}")
    known = isinstance(status, int) and not (kind is ConnectionLostError or kind is ResponseFormatError)
    if kind is ServerError and status in _SERVER_STATUS:
        kind = _SERVER_STATUS[status]
    return kind(f"litellm reports: {message}", status=status if known else None)


_SERVER_STATUS: dict[Any, type[AsyncModelsError]] = {
    408: ServerTimeoutError,
    409: ConflictError,
    429: RateLimitError,
    503: OverloadedError,
    504: ServerTimeoutError,
    529: OverloadedError,
}


def _class_of(error: BaseException) -> type[AsyncModelsError] | None:
    return next((_KINDS[name] for name in _names(error) if name in _KINDS), None)


def _message(error: BaseException) -> str:
    message = getattr(error, "message", None)
    return _excerpt(_PREFIX.sub("", message if isinstance(message, str) else str(error)))


def _excerpt(text: str) -> str:
    # Some messages hold a whole traceback, which is in the cause anyway.
    return " ".join(_GROUPS.sub("", text.partition("Traceback (most recent call last)")[0]).split())[:_EXCERPT]


def _mask(chain: list[BaseException], secrets: Collection[str]) -> None:
    """Takes ``secrets`` out of everything that the exceptions of ``chain`` print."""

    def masked(value: Any) -> Any:
        if isinstance(value, str):
            for secret in secrets:
                value = value.replace(secret, _MASK)
        elif type(value) is dict:
            return {key: masked(inner) for key, inner in value.items()}
        elif type(value) in (tuple, list):
            return type(value)(masked(inner) for inner in value)
        return value

    for error in chain:
        error.args = masked(error.args)
        for name in ("message", "body", "litellm_debug_info", "reported"):
            value = getattr(error, name, None)
            if value is not None:
                try:
                    setattr(error, name, masked(value))
                except AttributeError:
                    continue  # a read-only property of some package, made from the arguments
