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
        (410, errors.NotFoundError, False),
        (413, errors.InvalidRequestError, False),
        (418, errors.InvalidRequestError, False),
        (422, errors.InvalidRequestError, False),
        (424, errors.ServerError, True),
        (429, errors.RateLimitError, True),
        (500, errors.ServerError, True),
        (502, errors.ServerError, True),
        (503, errors.OverloadedError, True),
        (504, errors.ServerTimeoutError, True),
        (524, errors.ServerTimeoutError, True),
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
        (
            400,
            {"code": "BadRequest", "innererror": {"code": "ResponsibleAIPolicyViolation"}},
            errors.ContentFilterError,
        ),
        (400, {"code": None, "inner_error": {"code": "ResponsibleAIPolicyViolation"}}, errors.ContentFilterError),
        (400, {"code": "BadRequest", "innererror": {"code": "Whatever"}, "message": "m"}, errors.InvalidRequestError),
        (
            400,
            {"code": ["odd"], "innererror": ["odd"], "type": {"code": 7}, "message": "m"},
            errors.InvalidRequestError,
        ),
        (401, {"code": "PermissionDenied", "message": "m"}, errors.PermissionDeniedError),
        (400, {"code": "invalid_api_key", "message": "m"}, errors.AuthenticationError),
        (401, {"type": "invalid_request_error", "message": "m"}, errors.AuthenticationError),
        (429, {"type": "invalid_request_error", "code": "rate_limit_exceeded", "message": "m"}, errors.RateLimitError),
        (500, {"type": "server_error", "message": "m"}, errors.ServerError),
        (503, {"type": "server_error", "message": "m"}, errors.OverloadedError),
        (429, {"type": "tokens", "code": None, "message": "m"}, errors.RateLimitError),
        (400, {"type": "invalid_request_error", "code": "model_not_supported", "message": "m"}, errors.NotFoundError),
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
        (
            "This endpoint's maximum context length is 8192 tokens. However, you requested about 9000 tokens.",
            9000,
            8192,
        ),
        ("The input token count (1048577) exceeds the maximum number of tokens allowed (1048576).", 1048577, 1048576),
        ("request (5000 tokens) exceeds the available context size (4096 tokens), try increasing it", 5000, 4096),
        (
            "This model's maximum prompt length is 131072 but the request contains 537812 tokens.",
            537812,
            131072,
        ),
        (
            "Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768 maximum context length",
            40000,
            32768,
        ),
        ("maximum context length is 4096 tokens.", None, 4096),
        (
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. "
            "Given: 6 `inputs` tokens and 4091 `max_new_tokens`",
            4097,
            4096,
        ),
        ("Input validation error: `inputs` must have less than 1024 tokens. Given: 2048", 2048, 1024),
        ("The decoder prompt (length 5000) is longer than the maximum model length of 4096.", 5000, 4096),
        ("The input (5000 tokens) is longer than the model's context length (4096 tokens).", 5000, 4096),
        (
            "Requested token count exceeds the model's maximum context length of 4096 tokens. "
            "You requested a total of 5000 tokens: 4000 tokens from the input messages.",
            5000,
            4096,
        ),
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


def test_geminis_errors_come_in_a_list() -> None:
    """Behind OpenAI's paths Google answers in its own shape; what it says of waiting is among the details."""
    delay = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.5s"}
    body = [{"error": {"code": 429, "message": "Slow down.", "status": "RESOURCE_EXHAUSTED", "details": [{}, delay]}}]
    error = error_from_response(429, {}, json.dumps(body).encode())
    assert isinstance(error, errors.RateLimitError)
    assert (error.message, error.retry_after) == ("The provider answered 429: Slow down.", 34.5)


@pytest.mark.parametrize("code", ["invalid_prompt", "invalid_image_url"])
def test_the_codes_of_the_responses_api(code: str) -> None:
    """A request that was not accepted is not tried again, also when it fails in the middle of a stream."""
    error = error_from_body({"code": code, "message": "m"}, default=errors.StreamError)
    assert isinstance(error, errors.InvalidRequestError)


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
        ({"x-ratelimit-remaining-tokens": "5", "x-rate-limit-reset-tokens": "55"}, 55.0),
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


# -- Hugging Face and TGI ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (429, "overloaded", errors.OverloadedError),
        (422, "validation", errors.InvalidRequestError),
        (422, "template_error", errors.InvalidRequestError),
        (424, "generation", errors.ServerError),
        (500, "incomplete_generation", errors.ServerError),
    ],
)
def test_tgi_writes_the_type_beside_the_error(status: int, code: str, kind: type[errors.AsyncModelsError]) -> None:
    """It is the code, with a status and, inside a stream, without."""
    refused = error_from_response(status, {}, json.dumps({"error": "no", "error_type": code}).encode())
    streamed = error_from_body("no", default=errors.StreamError, error_type=code)
    assert (type(refused), refused.code, refused.status) == (kind, code, status)
    assert (type(streamed), streamed.code, streamed.status) == (kind, code, None)
    assert (refused.message, streamed.message) == (
        f"The provider answered {status}: no",
        "The provider reported an error: no",
    )


def test_a_stream_may_carry_the_status_of_its_error() -> None:
    """TGI calls it http_status_code."""
    error = error_from_body({"message": "no", "http_status_code": 422}, default=errors.StreamError)
    assert (type(error), error.status) == (errors.InvalidRequestError, 422)


@pytest.mark.parametrize("code", ["BadRequestError", None])
def test_a_context_that_is_too_long_may_be_told_in_words_only(code: str | None) -> None:
    """vLLM has no code for it; refused, in a stream, or in a body with a good status."""
    words = "This model's maximum context length is 8 tokens. However, you requested 9 tokens."
    body = json.dumps({"object": "error", "message": words, "type": code, "code": 400}).encode()
    for error in (
        error_from_response(400, {}, body),
        error_from_body({"message": words, "type": code}, default=errors.StreamError),
        error_from_body(words, default=errors.InvalidResponseError),
    ):
        assert isinstance(error, errors.ContextLengthError)
        assert (error.requested, error.limit, error.retryable) == (9, 8, False)


def test_words_about_the_context_do_not_change_what_a_status_means() -> None:
    """A 429 that quotes a prompt stays a 429."""
    assert type(error_from_response(429, {}, body(message="maximum context length is 8"))) is errors.RateLimitError


def test_a_model_that_is_loading_says_how_long() -> None:
    """In the body; a header goes before it."""
    loading = b'{"error": "Model x is currently loading", "estimated_time": 20.5}'
    error = error_from_response(503, {}, loading)
    assert (type(error), error.retry_after) == (errors.OverloadedError, 20.5)
    assert error_from_response(503, {"retry-after": "3"}, loading).retry_after == 3
    for nonsense in (b'{"estimated_time": "soon"}', b'{"estimated_time": -1}', b"<html>estimated_time</html>"):
        assert error_from_response(503, {}, nonsense).retry_after is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"ratelimit": '"api";r=0;t=55'}, 55),
        ({"ratelimit": '"burst";r=3;t=99, "api"; r=0; t=55'}, 55),
        ({"ratelimit": '"api";r=2;t=55'}, None),
        ({"ratelimit-remaining": "0", "ratelimit-reset": "7"}, 7),
        ({"ratelimit-remaining": "4", "ratelimit-reset": "7"}, None),
        ({"ratelimit": '"api";r=0;t=55', "retry-after": "2"}, 2),
    ],
)
def test_the_reset_of_an_exhausted_window_is_the_wait(headers: dict[str, str], seconds: float | None) -> None:
    """As the IETF's draft spells it, for a 429 only: the header stands on every answer."""
    assert retry_after(429, headers) == seconds
    if "retry-after" not in headers:
        assert retry_after(503, headers) is None


def test_the_hub_says_in_headers_what_is_wrong() -> None:
    """Its code makes a 401 what it is, a model that does not exist; its message stands in for a body without one."""
    headers = {"x-error-code": "RepoNotFound", "x-error-message": "Repository not found", "x-amzn-trace-id": "Root=1"}
    error = error_from_response(401, headers, b"<html></html>")
    assert (type(error), error.code, error.request_id) == (errors.NotFoundError, "RepoNotFound", "Root=1")
    assert error.message == "The provider answered 401: Repository not found"
    gated = error_from_response(403, {"x-error-code": "GatedRepo"}, b"{}")
    assert type(gated) is errors.PermissionDeniedError


def test_an_error_may_be_a_list() -> None:
    """Its items become one message."""
    assert error_from_response(400, {}, b'{"error": ["a", "b"]}').message == "The provider answered 400: a; b"
