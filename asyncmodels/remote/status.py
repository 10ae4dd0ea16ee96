"""A provider's refusal as an error of ours: by its HTTP status, its error code, and how long it asks to wait."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import orjson

from asyncmodels.errors import (
    AsyncModelsError,
    AuthenticationError,
    ConflictError,
    ContentFilterError,
    ContextLengthError,
    InvalidRequestError,
    InvalidResponseError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    QuotaExceededError,
    RateLimitError,
    ServerError,
    ServerTimeoutError,
)

__all__ = ["error_from_body", "error_from_response", "retry_after"]

_BY_STATUS: dict[int, type[AsyncModelsError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    402: QuotaExceededError,
    403: PermissionDeniedError,
    404: NotFoundError,
    408: ServerTimeoutError,
    409: ConflictError,
    413: InvalidRequestError,
    422: InvalidRequestError,
    429: RateLimitError,
    503: OverloadedError,
    504: ServerTimeoutError,
    529: OverloadedError,
}

# The provider's own code says more than the status: out of credit is a 429 that no waiting mends.
_BY_CODE: dict[str, type[AsyncModelsError]] = {
    "context_length_exceeded": ContextLengthError,
    "string_above_max_length": ContextLengthError,
    "content_filter": ContentFilterError,
    "content_policy_violation": ContentFilterError,
    "ResponsibleAIPolicyViolation": ContentFilterError,
    "insufficient_quota": QuotaExceededError,
    "billing_hard_limit_reached": QuotaExceededError,
    "invalid_api_key": AuthenticationError,
    "model_not_found": NotFoundError,
    "rate_limit_exceeded": RateLimitError,
    "rate_limit_error": RateLimitError,
    "overloaded_error": OverloadedError,
    "server_error": ServerError,
    "internal_server_error": ServerError,
    "invalid_request_error": InvalidRequestError,
    "authentication_error": AuthenticationError,
}

_EXCERPT = 300


def error_from_response(status: int, headers: Mapping[str, str], body: bytes) -> AsyncModelsError:
    """The error that an answer with a bad ``status`` stands for."""
    code, message = _code_and_message(_json(body))
    if message is None:
        message = _excerpt(body)
    kind = _kind(status, code)
    text = f"The provider answered {status}{f': {message}' if message else '.'}"
    data: dict[str, Any] = {
        "status": status,
        "code": code,
        "retry_after": retry_after(status, headers),
        "request_id": headers.get("x-request-id") or headers.get("apim-request-id") or headers.get("request-id"),
    }
    if issubclass(kind, ContextLengthError):
        requested, limit = _context_numbers(message or "")
        return kind(text, requested=requested, limit=limit, **data)
    return kind(text, **data)


def error_from_body(error: Any, *, default: type[AsyncModelsError], request_id: str | None = None) -> AsyncModelsError:
    """The error that an ``error`` object stands for which came with a good status, as in the middle of a stream."""
    code, message = _code_and_message({"error": error})
    status = error.get("status") or error.get("code") if isinstance(error, Mapping) else None
    number = int(status) if isinstance(status, int) or (isinstance(status, str) and status.isdigit()) else None
    known = number is not None and 400 <= number < 600
    if known or (code is not None and code in _BY_CODE):
        kind = _kind(number if known and number is not None else 500, code)
    else:
        kind = default
    return kind(
        f"The provider reported an error: {message or code or 'it gave no reason'}",
        status=number if known else None,
        code=code,
        request_id=request_id,
    )


def _kind(status: int, code: str | None) -> type[AsyncModelsError]:
    by_code = _BY_CODE.get(code) if code is not None else None
    default = ServerError if status >= 500 else InvalidRequestError if status >= 400 else InvalidResponseError
    by_status = _BY_STATUS.get(status, default)
    if by_code is None:
        return by_status
    # "invalid_request_error" is a type that accompanies every refusal; the status then knows more.
    return by_status if issubclass(by_status, by_code) or by_code is InvalidRequestError else by_code


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except ValueError:
        return None


def _code_and_message(data: Any) -> tuple[str | None, str | None]:
    """The code and the message of OpenAI's ``{"error": {...}}`` and of the spellings that others use for it."""
    error = data.get("error", data) if isinstance(data, Mapping) else data
    if isinstance(error, str):
        return None, error[:_EXCERPT]
    if not isinstance(error, Mapping):
        return None, None
    message = error.get("message") or error.get("detail") or error.get("error_message")
    for key in ("code", "type", "innererror"):
        code = error.get(key)
        code = code.get("code") if isinstance(code, Mapping) else code
        if isinstance(code, str) and (code in _BY_CODE or key == "code"):
            break
    else:
        code = error.get("type")
    return (
        code if isinstance(code, str) else None,
        None if message is None else (message if isinstance(message, str) else str(message))[:_EXCERPT],
    )


def _excerpt(body: bytes) -> str:
    text = re.sub(r"<[^>]*>|\s+", " ", body[:2000].decode(errors="replace"))
    return re.sub(r"\s+", " ", text).strip()[:_EXCERPT]


_NUMBERS = (
    # OpenAI and vLLM: "maximum context length is 8192 tokens. However, you requested 9000 tokens (...)"
    re.compile(
        r"maximum context length (?:is|of) (?P<limit>\d+).*?"
        r"(?:requested|resulted in|contains at least) (?P<requested>\d+)",
        re.S,
    ),
    # Anthropic-like: "prompt is too long: 210000 tokens > 200000 maximum"
    re.compile(r"(?P<requested>\d+) tokens > (?P<limit>\d+)"),
    re.compile(r"maximum context length (?:is|of) (?P<limit>\d+)(?P<requested>)"),
)


def _context_numbers(message: str) -> tuple[int | None, int | None]:
    for pattern in _NUMBERS:
        if match := pattern.search(message):
            return int(match["requested"]) if match["requested"] else None, int(match["limit"])
    return None, None


# -- how long to wait -------------------------------------------------------------------------------------------------


def retry_after(status: int, headers: Mapping[str, str]) -> float | None:
    """The seconds that a server asks to wait, in whatever spelling; None when it does not say.

    In this order: ``retry-after-ms`` and ``x-ms-retry-after-ms`` (milliseconds), ``retry-after`` (seconds or an HTTP
    date, RFC 9110 section 10.2.3), and for a 429 the reset of the exhausted ``x-ratelimit-*`` window ("1s", "6m0s").
    """
    for name in ("retry-after-ms", "x-ms-retry-after-ms"):
        milliseconds = _positive(headers.get(name))
        if milliseconds is not None:
            return milliseconds / 1000
    value = headers.get("retry-after")
    if value is not None:
        seconds = _positive(value)
        return seconds if seconds is not None else _until_date(value, headers.get("date"))
    return _window_reset(headers) if status == 429 else None


def _positive(value: str | None) -> float | None:
    try:
        number = float(value) if value is not None else None
    except ValueError:
        return None
    return number if number is not None and 0 <= number < float("inf") else None


def _until_date(value: str, date: str | None) -> float | None:
    try:
        moment = parsedate_to_datetime(value).timestamp()
    except (TypeError, ValueError):
        return None
    try:
        # Against the server's own clock where it says what time it is: ours may be off by minutes.
        now = parsedate_to_datetime(date).timestamp() if date else time.time()
    except (TypeError, ValueError):
        now = time.time()
    return max(0.0, moment - now)


_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>ms|h|m|s)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def _window_reset(headers: Mapping[str, str]) -> float | None:
    resets = [
        seconds
        for window in ("requests", "tokens")
        if headers.get(f"x-ratelimit-remaining-{window}") == "0"
        and (seconds := _duration(headers.get(f"x-ratelimit-reset-{window}"))) is not None
    ]
    return max(resets, default=None)


def _duration(value: str | None) -> float | None:
    if value is None:
        return None
    plain = _positive(value)
    if plain is not None:
        return plain
    parts = _DURATION.findall(value)
    return sum(float(number) * _UNITS[unit] for number, unit in parts) if parts else None
