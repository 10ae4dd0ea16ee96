"""A provider's refusal as an error of ours, and the spellings of "come back later"."""

from __future__ import annotations

import json
import time
from email.utils import formatdate

import pytest

from asyncmodels import errors
from asyncmodels.remote.status import error_from_body, error_from_response, retry_after


def body(**error: object) -> bytes:
    return json.dumps({"error": error}).encode()


@pytest.mark.parametrize(
    ("status", "kind", "retryable"),
    [
        (400, errors.InvalidRequestError, False),
        (401, errors.AuthenticationError, False),
        (402, errors.QuotaExceededError, False),
        (403, errors.PermissionDeniedError, False),
        (404, errors.NotFoundError, False),
        (408, errors.ServerTimeoutError, True),
        (409, errors.ConflictError, True),
        (413, errors.InvalidRequestError, False),
        (418, errors.InvalidRequestError, False),
        (422, errors.InvalidRequestError, False),
        (429, errors.RateLimitError, True),
        (500, errors.ServerError, True),
        (502, errors.ServerError, True),
        (503, errors.OverloadedError, True),
        (504, errors.ServerTimeoutError, True),
        (529, errors.OverloadedError, True),
        (599, errors.ServerError, True),
    ],
)
def test_each_status_is_a_decision(status: int, kind: type[errors.AsyncModelsError], retryable: bool) -> None:
    """The class says what the caller can do, the error carries what the provider said."""
    error = error_from_response(status, {"x-request-id": "req-1"}, body(message="no", type="t"))
    assert (type(error), error.retryable, error.status, error.request_id) == (kind, retryable, status, "req-1")
    assert error.message == f"The provider answered {status}: no"


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (429, {"code": "insufficient_quota", "message": "m"}, errors.QuotaExceededError),
        (400, {"code": "context_length_exceeded", "message": "m"}, errors.ContextLengthError),
        (400, {"code": "content_filter", "message": "m"}, errors.ContentFilterError),
        (400, {"code": "invalid_api_key", "message": "m"}, errors.AuthenticationError),
        (401, {"type": "invalid_request_error", "message": "m"}, errors.AuthenticationError),
        (429, {"type": "invalid_request_error", "code": "rate_limit_exceeded", "message": "m"}, errors.RateLimitError),
        (500, {"type": "server_error", "message": "m"}, errors.ServerError),
        (503, {"type": "server_error", "message": "m"}, errors.OverloadedError),
        (429, {"type": "tokens", "code": None, "message": "m"}, errors.RateLimitError),
    ],
)
def test_the_code_says_more_than_the_status(status: int, error: dict[str, object], kind: type) -> None:
    """Out of credit is a 429 that waiting does not mend, and a 400 may be one of several things."""
    assert type(error_from_response(status, {}, body(**error))) is kind


@pytest.mark.parametrize(
    ("message", "requested", "limit"),
    [
        (
            "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens (1 in the x).",
            9000,
            8192,
        ),
        ("maximum context length is 4096 tokens. However, your messages resulted in 5000 tokens.", 5000, 4096),
        ("prompt is too long: 210000 tokens > 200000 maximum", 210000, 200000),
        ("maximum context length is 4096 tokens.", None, 4096),
        ("too long", None, None),
    ],
)
def test_context_errors_carry_the_numbers(message: str, requested: int | None, limit: int | None) -> None:
    """Who routes to a longer model needs the numbers, where the provider gives them."""
    error = error_from_response(400, {}, body(code="context_length_exceeded", message=message))
    assert isinstance(error, errors.ContextLengthError)
    assert (error.requested, error.limit) == (requested, limit)


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>", "502 Bad Gateway"),
        (b"", "The provider answered 502."),
        (b'{"detail": "no such route"}', "no such route"),
        (b'{"message": "flat"}', "flat"),
        (b'{"error": "just text"}', "just text"),
        (b'"a string"', "a string"),
        (b"[1]", "The provider answered 502"),
        (b"\xff\xfe broken", "broken"),
        (b'{"error": {"message": {"nested": 1}}}', "nested"),
    ],
)
def test_every_shape_of_body_makes_one_line(raw: bytes, part: str) -> None:
    """Gateways answer with HTML, nothing, or JSON of their own; the message is one short line of it."""
    error = error_from_response(502, {}, raw)
    assert part in error.message
    assert "\n" not in error.message
    assert "<" not in error.message


def test_a_huge_body_does_not_fill_the_message() -> None:
    """An error page of megabytes is cut."""
    assert len(error_from_response(500, {}, b"x" * 5_000_000).message) < 400


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.2"}, 0.2),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after-ms": "350"}, 0.35),
        ({"x-ms-retry-after-ms": "1200"}, 1.2),
        ({"retry-after-ms": "350", "retry-after": "9"}, 0.35),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:27:00 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m30.5s"}, 90.5),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "120ms"}, 0.12),
        ({"x-ratelimit-remaining-tokens": "5", "x-ratelimit-reset-tokens": "120ms"}, None),
        ({}, None),
    ],
)
def test_every_spelling_of_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    """Providers say how long to wait in half a dozen ways."""
    found = retry_after(429, headers)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_a_date_without_the_servers_clock_is_taken_against_ours() -> None:
    """Without a Date header the local clock is all there is."""
    found = retry_after(503, {"retry-after": formatdate(time.time() + 100, usegmt=True)})
    assert found is not None
    assert 90 < found < 101


def test_window_resets_count_only_for_a_429() -> None:
    """A 500 says nothing about the limits, whatever its headers carry."""
    assert retry_after(500, {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "9s"}) is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "m", "code": "rate_limit_exceeded"}, errors.RateLimitError),
        ({"message": "m", "code": 429}, errors.RateLimitError),
        ({"message": "m", "code": "503"}, errors.OverloadedError),
        ({"message": "m", "type": "overloaded_error"}, errors.OverloadedError),
        ({"message": "m"}, errors.StreamError),
        ("text", errors.StreamError),
        ({"message": "m", "code": 7}, errors.StreamError),
    ],
)
def test_errors_inside_a_good_answer(error: object, kind: type) -> None:
    """An error object in a stream is typed by its code, or else is a StreamError."""
    assert type(error_from_body(error, default=errors.StreamError)) is kind
