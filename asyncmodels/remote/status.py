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
    StreamError,
)
from asyncmodels.remote.limit_headers import rate_limits_in

__all__ = ["error_from_body", "error_from_response", "request_id_of", "retry_after"]

_BY_STATUS: dict[int, type[AsyncModelsError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    402: QuotaExceededError,
    403: PermissionDeniedError,
    404: NotFoundError,
    408: ServerTimeoutError,
    409: ConflictError,
    410: NotFoundError,
    413: InvalidRequestError,
    422: InvalidRequestError,
    424: ServerError,  # TGI's for a generation that failed
    429: RateLimitError,
    503: OverloadedError,
    504: ServerTimeoutError,
    524: ServerTimeoutError,
    529: OverloadedError,
}

# The provider's own code says more than the status: out of credit is a 429 that no waiting mends.
_BY_CODE: dict[str, type[AsyncModelsError]] = {
    "context_length_exceeded": ContextLengthError,
    "string_above_max_length": ContextLengthError,
    "content_filter": ContentFilterError,
    "content_policy_violation": ContentFilterError,
    "ResponsibleAIPolicyViolation": ContentFilterError,
    # Azure's, which sends the first with a 401
    "PermissionDenied": PermissionDeniedError,
    "DeploymentNotFound": NotFoundError,
    "RateLimitReached": RateLimitError,
    "insufficient_quota": QuotaExceededError,
    "billing_hard_limit_reached": QuotaExceededError,
    "invalid_api_key": AuthenticationError,
    "model_not_found": NotFoundError,
    "model_not_supported": NotFoundError,
    "RepoNotFound": NotFoundError,
    "GatedRepo": PermissionDeniedError,
    "rate_limit_exceeded": RateLimitError,
    "rate_limit_error": RateLimitError,
    "overloaded": OverloadedError,
    "overloaded_error": OverloadedError,
    "server_error": ServerError,
    "internal_server_error": ServerError,
    "invalid_request_error": InvalidRequestError,
    "authentication_error": AuthenticationError,
    # llama.cpp's
    "exceed_context_size_error": ContextLengthError,
    # the Responses API's
    "invalid_prompt": InvalidRequestError,
    "bio_policy": ContentFilterError,
    "misalignment_policy_violation": ContentFilterError,
    "image_content_policy_violation": ContentFilterError,
    **dict.fromkeys(
        (
            "invalid_image",
            "invalid_image_format",
            "invalid_base64_image",
            "invalid_image_url",
            "invalid_image_mode",
            "image_too_large",
            "image_too_small",
            "image_parse_error",
            "image_file_too_large",
            "unsupported_image_media_type",
            "empty_image_file",
            "image_file_not_found",
        ),
        InvalidRequestError,
    ),
    # TGI's error_type
    "validation": InvalidRequestError,
    "template_error": InvalidRequestError,
    "tool_error": InvalidRequestError,
    "generation": ServerError,
    "incomplete_generation": ServerError,
    "incomplete_generation_stream": ServerError,
}

_EXCERPT = 300


def error_from_response(status: int, headers: Mapping[str, str], body: bytes) -> AsyncModelsError:
    """The error that an answer with a bad ``status`` stands for."""
    data = _json(body)
    if isinstance(data, list) and len(data) == 1:
        data = data[0]  # Gemini's, behind OpenAI's paths
    code, message = _code_and_message(data)
    if message is None:
        message = headers.get("x-error-message") or _excerpt(body)
    code = code or headers.get("x-error-code")
    text = f"The provider answered {status}{f': {message}' if message else '.'}"
    error = _error(
        _kind(status, code),
        text,
        message,
        status=status,
        code=code,
        retry_after=_first(retry_after(status, headers), _loading_time(data), _retry_delay(data)),
        request_id=request_id_of(headers),
    )
    error.rate_limits = rate_limits_in(headers)
    return error


def error_from_body(
    error: Any, *, default: type[AsyncModelsError], request_id: str | None = None, error_type: object = None
) -> AsyncModelsError:
    """The error that an ``error`` object stands for which came with a good status, as in the middle of a stream.

    ``error_type`` is what TGI writes beside it.
    """
    code, message = _code_and_message({"error": error, "error_type": error_type})
    status = next((error[key] for key in _STATUSES if error.get(key)), None) if isinstance(error, Mapping) else None
    number = int(status) if isinstance(status, int) or (isinstance(status, str) and status.isdigit()) else None
    if number is not None and not 400 <= number < 600:
        number = None
    kind = _BY_CODE.get(code or "", default) if number is None else _kind(number, code)
    text = f"The provider reported an error: {message or code or 'it gave no reason'}"
    return _error(kind, text, message, status=number, code=code, request_id=request_id)


_REQUEST_IDS = ("x-request-id", "apim-request-id", "x-ms-request-id", "request-id", "x-amzn-trace-id", "x-amz-cf-id")
_STATUSES = ("status", "code", "http_status_code")


def request_id_of(headers: Mapping[str, str]) -> str | None:
    """The provider's id of a request, which its support asks for."""
    return next((headers[name] for name in _REQUEST_IDS if headers.get(name)), None)


def _error(kind: type[AsyncModelsError], text: str, message: str | None, **data: Any) -> AsyncModelsError:
    """An error of ``kind``, or one about the context's length when the provider says that in words only."""
    requested, limit = _context_numbers(message or "")
    if issubclass(kind, ContextLengthError) or (limit is not None and kind in _IN_WORDS):
        return ContextLengthError(text, requested=requested, limit=limit, **data)
    return kind(text, **data)


# vLLM, SGLang and TGI have no code for it; a stream of theirs has no status either.
_IN_WORDS = (InvalidRequestError, StreamError, InvalidResponseError)


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
    if isinstance(error, list):
        error = "; ".join(map(str, error))
    if isinstance(error, str):
        code = data.get("error_type") if isinstance(data, Mapping) else None
        return code if isinstance(code, str) else None, error[:_EXCERPT]
    if not isinstance(error, Mapping):
        return None, None
    message = error.get("message") or error.get("detail") or error.get("error_message")
    return (
        _code(error),
        None if message is None else (message if isinstance(message, str) else str(message))[:_EXCERPT],
    )


def _code(error: Mapping[str, Any]) -> str | None:
    inner = error.get("innererror") or error.get("inner_error")
    code, kind, inner = (
        value.get("code") if isinstance(value, Mapping) else value
        for value in (error.get("code"), error.get("type"), inner)
    )
    if isinstance(inner, str) and inner in _BY_CODE and not (isinstance(code, str) and code in _BY_CODE):
        return inner  # Azure may say "BadRequest" outside, and what is bad about it inside
    if isinstance(code, str):
        return code
    return kind if isinstance(kind, str) else None


def _excerpt(body: bytes) -> str:
    text = re.sub(r"<[^>]*>|\s+", " ", body[:2000].decode(errors="replace"))
    return re.sub(r"\s+", " ", text).strip()[:_EXCERPT]


_NUMBERS = (
    # OpenAI and vLLM: "maximum context length is 8192 tokens. However, you requested 9000 tokens (...)"
    # SGLang: "maximum context length of 8192 tokens. You requested a total of 9000 tokens"
    re.compile(
        r"maximum context length (?:is|of) (?P<limit>\d+).*?"
        r"(?:requested(?: a total of| about)?|resulted in|contains at least) (?P<requested>\d+)",
        re.S,
    ),
    # Anthropic-like: "prompt is too long: 210000 tokens > 200000 maximum"
    re.compile(r"(?P<requested>\d+) tokens > (?P<limit>\d+)"),
    re.compile(r"maximum context length (?:is|of) (?P<limit>\d+)(?P<requested>)"),
    # Gemini: "The input token count (1048577) exceeds the maximum number of tokens allowed (1048576)."
    re.compile(r"token count \((?P<requested>\d+)\) exceeds the maximum number of tokens allowed \((?P<limit>\d+)"),
    # llama.cpp: "request (5000 tokens) exceeds the available context size (4096 tokens), try increasing it"
    re.compile(r"request \((?P<requested>\d+) tokens\) exceeds the available context size \((?P<limit>\d+) tokens"),
    # xAI: "This model's maximum prompt length is 131072 but the request contains 537812 tokens."
    re.compile(r"maximum prompt length is (?P<limit>\d+) but the request contains (?P<requested>\d+) tokens"),
    # Mistral: "Prompt contains 40000 tokens ..., too large for model with 32768 maximum context length"
    re.compile(r"contains (?P<requested>\d+) tokens.*?(?P<limit>\d+) maximum context length", re.S),
    # TGI: "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 6 `inputs` tokens and 4091 `max_new_tokens`"
    re.compile(
        r"`inputs` tokens \+ `max_new_tokens` must be <= (?P<limit>\d+)\. "
        r"Given: (?P<requested>\d+) `inputs` tokens and (?P<more>\d+)"
    ),
    # TGI: "`inputs` must have less than 1024 tokens. Given: 2048"
    re.compile(r"`inputs` must have less than (?P<limit>\d+) tokens\. Given: (?P<requested>\d+)"),
    # vLLM: "The decoder prompt (length 5000) is longer than the maximum model length of 4096."
    re.compile(r"prompt \(length (?P<requested>\d+)\) is longer than the maximum model length of (?P<limit>\d+)"),
    # SGLang: "The input (5000 tokens) is longer than the model's context length (4096 tokens)."
    re.compile(r"input \((?P<requested>\d+) tokens\) is longer than the model's context length \((?P<limit>\d+)"),
)


def _context_numbers(message: str) -> tuple[int | None, int | None]:
    for pattern in _NUMBERS:
        if match := pattern.search(message):
            found = match.groupdict()
            requested = int(found["requested"]) + int(found.get("more") or 0) if found["requested"] else None
            return requested, int(found["limit"])
    return None, None


# -- how long to wait -------------------------------------------------------------------------------------------------


def retry_after(status: int, headers: Mapping[str, str]) -> float | None:
    """The seconds that a server asks to wait, in whatever spelling; None when it does not say.

    In this order: ``retry-after-ms`` and ``x-ms-retry-after-ms`` (milliseconds), ``retry-after`` (seconds or an HTTP
    date, RFC 9110 section 10.2.3), and for a 429 the reset of the exhausted window: ``x-ratelimit-*`` ("1s", "6m0s"),
    ``x-rate-limit-reset-*``, ``ratelimit: "api";r=0;t=55``, or ``ratelimit-remaining: 0`` with ``ratelimit-reset``
    (seconds).
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


def _loading_time(data: Any) -> float | None:
    """The seconds that Hugging Face expects until a model is loaded, which it says in the body of a 503."""
    seconds = data.get("estimated_time") if isinstance(data, Mapping) else None
    return _positive(str(seconds)) if isinstance(seconds, int | float) else None


def _retry_delay(data: Any) -> float | None:
    """Google's ``{"@type": ".../google.rpc.RetryInfo", "retryDelay": "34.5s"}`` among the details of an error."""
    error = data.get("error") if isinstance(data, Mapping) else None
    details = error.get("details") if isinstance(error, Mapping) else None
    for detail in details if isinstance(details, list) else ():
        delay = detail.get("retryDelay") if isinstance(detail, Mapping) else None
        if isinstance(delay, str):
            return _duration(delay)
    return None


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


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
    # Azure's other spelling, which comes with no word about what remains
    resets += [
        seconds
        for window in ("requests", "tokens")
        if (seconds := _duration(headers.get(f"x-rate-limit-reset-{window}"))) is not None
    ]
    # https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/, as it is now and as it was before
    resets += [float(reset) for reset in _EXHAUSTED.findall(headers.get("ratelimit") or "")]
    reset = _positive(headers.get("ratelimit-reset"))
    if reset is not None and headers.get("ratelimit-remaining") == "0":
        resets.append(reset)
    return max(resets, default=None)


_EXHAUSTED = re.compile(r";\s*r=0\s*;\s*t=(\d+)")


def _duration(value: str | None) -> float | None:
    if value is None:
        return None
    plain = _positive(value)
    if plain is not None:
        return plain
    parts = _DURATION.findall(value)
    return sum(float(number) * _UNITS[unit] for number, unit in parts) if parts else None
