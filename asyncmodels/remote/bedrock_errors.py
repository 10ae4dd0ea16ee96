"""What botocore, aiobotocore and aiohttp raise, as errors of ours: by the code that Bedrock gave, or by what broke."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Mapping
from typing import Any

import aiohttp
from botocore import exceptions as boto
from botocore.eventstream import ParserError
from botocore.parsers import ResponseParserError

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
    MissingKeyError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    ProtocolError,
    QuotaExceededError,
    RateLimitError,
    ReadTimeoutError,
    ServerError,
    ServerTimeoutError,
    StreamError,
    TLSError,
    TransportError,
    TruncatedResponseError,
)
from asyncmodels.remote.status import retry_after

__all__ = ["error_from"]

_BY_CODE: Mapping[str, type[AsyncModelsError]] = {
    "ThrottlingException": RateLimitError,
    "TooManyRequestsException": RateLimitError,
    "RequestLimitExceeded": RateLimitError,
    "ServiceQuotaExceededException": QuotaExceededError,
    "ModelNotReadyException": OverloadedError,
    "ServiceUnavailableException": OverloadedError,
    "ModelTimeoutException": ServerTimeoutError,
    "ModelErrorException": ServerError,
    "ModelStreamErrorException": StreamError,
    "InternalServerException": ServerError,
    "AccessDeniedException": PermissionDeniedError,
    "UnrecognizedClientException": AuthenticationError,
    "ExpiredTokenException": AuthenticationError,
    "ExpiredToken": AuthenticationError,
    "InvalidSignatureException": AuthenticationError,
    "SignatureDoesNotMatch": AuthenticationError,
    "IncompleteSignatureException": AuthenticationError,
    "InvalidClientTokenId": AuthenticationError,
    "MissingAuthenticationTokenException": AuthenticationError,
    "NotAuthorizedException": AuthenticationError,
    "ResourceNotFoundException": NotFoundError,
    "UnknownOperationException": NotFoundError,
    "ConflictException": ConflictError,
    "ValidationException": InvalidRequestError,
}

_BY_STATUS: Mapping[int, type[AsyncModelsError]] = {
    401: AuthenticationError,
    402: QuotaExceededError,
    403: PermissionDeniedError,
    404: NotFoundError,
    408: ServerTimeoutError,
    409: ConflictError,
    429: RateLimitError,
    503: OverloadedError,
    504: ServerTimeoutError,
}

# One code stands for many things; the message tells them apart.
_BY_MESSAGE: tuple[tuple[type[AsyncModelsError], re.Pattern[str], type[AsyncModelsError]], ...] = (
    (
        InvalidRequestError,
        re.compile(
            r"prompt is too long|input is too long|too many (?:input )?tokens|input tokens exceeded"
            r"|exceeds? (?:the )?(?:maximum (?:input |context )?length|context (?:limit|window|length))"
            r"|maximum context length|exceed context limit",
            re.I,
        ),
        ContextLengthError,
    ),
    (
        InvalidRequestError,
        re.compile(r"content (?:filter|polic)|blocked by|responsible ai|safety (?:filter|system)", re.I),
        ContentFilterError,
    ),
    (InvalidRequestError, re.compile(r"model identifier is invalid|model id is invalid", re.I), NotFoundError),
    (PermissionDeniedError, re.compile(r"api key|authentication failed|bearer token", re.I), AuthenticationError),
    # Tomorrow's tokens are no use to a retry.
    (RateLimitError, re.compile(r"tokens per day|daily", re.I), QuotaExceededError),
)

_NUMBERS = (
    re.compile(r"(?P<requested>\d+) tokens > (?P<limit>\d+)"),
    re.compile(r"(?P<prompt>\d+) \+ (?P<more>\d+) > (?P<limit>\d+)"),
    re.compile(r"max(?:imum)? input tokens:? (?P<limit>\d+).*?token count:? (?P<requested>\d+)", re.I | re.S),
    re.compile(
        r"maximum context length (?:is|of) (?P<limit>\d+).*?(?:requested|contains|has) (?P<requested>\d+)", re.S
    ),
    re.compile(r"maximum context length (?:is|of) (?P<limit>\d+)"),
)

_EXCERPT = 300
_TAG = re.compile(r"<[^>]*>")
"""A proxy's page of HTML comes without its tags."""


def error_from(error: BaseException, *, opening: bool = False) -> AsyncModelsError:
    """The error of ours that ``error`` stands for; ``opening`` when it was raised while the client was being made."""
    if isinstance(error, AsyncModelsError):
        return error
    if isinstance(error, boto.ClientError):
        return _refusal(error)
    if isinstance(error, boto.ParamValidationError):
        return InvalidRequestError(f"Converse takes no such request: {_excerpt(error.kwargs.get('report') or error)}")
    if isinstance(error, ParserError):
        return InvalidResponseError(f"The stream is no event stream: {type(error).__name__}: {_excerpt(error)}")
    if isinstance(error, ResponseParserError):
        return InvalidResponseError(f"The answer cannot be read: {_excerpt(error)}")
    configuration = _configuration(error)
    if configuration is not None:
        return configuration
    reading = _reading(error)
    if reading is not None:
        return reading
    if isinstance(error, TypeError | ValueError) and not isinstance(error, UnicodeError | aiohttp.ClientError):
        if opening:
            return ConfigurationError(f"client_kwargs do not fit aiobotocore's create_client: {_excerpt(error)}")
        return InvalidRequestError(f"The request cannot be written as Converse wants it: {_excerpt(error)}")
    return _transport(error)


# -- Bedrock said no --------------------------------------------------------------------------------------------------


def _refusal(error: boto.ClientError) -> AsyncModelsError:
    response: Mapping[str, Any] = error.response
    details = response.get("Error") or {}
    metadata = response.get("ResponseMetadata") or {}
    in_stream = isinstance(error, boto.EventStreamError)
    code = str(details.get("Code") or "") or None
    # What comes with a good status in a stream begins with a small letter there.
    name = code[:1].upper() + code[1:] if code else ""
    # Where an event says what went wrong, botocore makes a status up.
    status = None if in_stream else metadata.get("HTTPStatusCode")
    message = _excerpt(_TAG.sub(" ", str(details.get("Message") or response.get("message") or "")[:2000]))
    kind = _kind(name, status, StreamError if in_stream else None)
    for general, pattern, special in _BY_MESSAGE:
        if kind is general and pattern.search(message):
            kind = special
            break
    headers = metadata.get("HTTPHeaders") or {}
    what = name if name and not name.isdigit() else "with an error" if status is None else f"HTTP {status}"
    data: dict[str, Any] = {
        "status": status,
        "code": code if code is None or not code.isdigit() else None,
        "retry_after": retry_after(status or 0, headers),
        "request_id": metadata.get("RequestId") or headers.get("x-amzn-requestid"),
    }
    text = f"Bedrock answered {what}{f': {message}' if message else '.'}"
    if kind is ContextLengthError:
        requested, limit = _context_numbers(message)
        return ContextLengthError(text, requested=requested, limit=limit, **data)
    return kind(text, **data)


def _reading(error: BaseException) -> AsyncModelsError | None:
    """What botocore stumbles over while it reads an answer: JSON of another shape. None where that is not so."""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_globals.get("__name__") in ("aiobotocore.parsers", "botocore.parsers"):
            # Only there is the status; without it a server that is down would not be asked again.
            answer = frame.f_locals.get("response")
            status = answer.get("status_code") if isinstance(answer, Mapping) else None
            if isinstance(status, int) and status >= 400:
                headers = answer.get("headers") or {} if isinstance(answer, Mapping) else {}
                return _kind("", status, None)(
                    f"Bedrock answered HTTP {status}, and no JSON object with it.",
                    status=status,
                    retry_after=retry_after(status, headers),
                    request_id=headers.get("x-amzn-requestid"),
                )
            return InvalidResponseError("The answer is no Converse output: its JSON has another shape.")
        trace = trace.tb_next
    return None


def _kind(name: str, status: int | None, default: type[AsyncModelsError] | None) -> type[AsyncModelsError]:
    if name in _BY_CODE:
        return _BY_CODE[name]
    if status is not None and status in _BY_STATUS:
        return _BY_STATUS[status]
    if default is not None:
        return default
    if status is None or status < 400:
        return ServerError if status is None else InvalidResponseError
    return ServerError if status >= 500 else InvalidRequestError


def _context_numbers(message: str) -> tuple[int | None, int | None]:
    for pattern in _NUMBERS:
        if match := pattern.search(message):
            found = match.groupdict()
            if "prompt" in found:
                return int(found["prompt"]) + int(found["more"]), int(found["limit"])
            return int(found["requested"]) if "requested" in found else None, int(found["limit"])
    return None, None


def _excerpt(text: object) -> str:
    return re.sub(r"\s+", " ", str(text)[:2000]).strip()[:_EXCERPT]


# -- nothing was sent -------------------------------------------------------------------------------------------------


def _configuration(error: BaseException) -> ConfigurationError | None:
    if isinstance(error, boto.NoCredentialsError | boto.NoAuthTokenError | boto.PartialCredentialsError):
        return MissingKeyError(
            "No AWS credentials: set AWS_BEARER_TOKEN_BEDROCK, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "configure a profile, or pass api_key=..., or both parts of a key in client_kwargs."
        )
    if isinstance(error, boto.NoRegionError):
        return ConfigurationError(
            'No AWS region: pass client_kwargs={"region_name": "us-east-1"}, or set AWS_DEFAULT_REGION.'
        )
    if isinstance(
        error,
        boto.CredentialRetrievalError
        | boto.TokenRetrievalError
        | boto.SSOError
        | boto.ProfileNotFound
        | boto.ConfigParseError
        | boto.ConfigNotFound
        | boto.InvalidRegionError
        | boto.InvalidConfigError
        | boto.InvalidRetryConfigurationError
        | boto.InvalidProxiesConfigError
        | boto.EndpointProviderError
        | boto.EndpointVariantError
        | boto.UnknownEndpointError
        | boto.UnknownServiceError
        | boto.DataNotFoundError
        | boto.MissingDependencyException,
    ):
        return ConfigurationError(f"botocore cannot be set up: {_excerpt(error)}")
    return None


# -- the bytes did not get through ------------------------------------------------------------------------------------


def _transport(error: BaseException) -> AsyncModelsError:
    inner = _innermost(error)
    # Where it has read a part of the head, aiohttp puts all of its own notes about it into the message.
    cut_off = isinstance(inner, aiohttp.ServerDisconnectedError) and not isinstance(inner.message, str)
    text = "the server disconnected" if cut_off else _excerpt(inner) or type(inner).__name__
    kind = _transport_kind(error, inner)
    return kind(f"The request to Bedrock failed: {text}.".replace("..", "."))


def _innermost(error: BaseException) -> BaseException:
    """botocore's errors hold the one of aiohttp that says what happened."""
    while isinstance(error, boto.BotoCoreError) and isinstance(error.kwargs.get("error"), BaseException):
        error = error.kwargs["error"]
    return error


def _transport_kind(error: BaseException, inner: BaseException) -> type[AsyncModelsError]:
    if isinstance(inner, aiohttp.ClientConnectorDNSError | socket.gaierror):
        return DNSError
    if isinstance(inner, aiohttp.ClientSSLError | ssl.SSLError) or isinstance(error, boto.SSLError):
        return TLSError
    if isinstance(inner, aiohttp.ClientPayloadError | boto.IncompleteReadError):
        return TruncatedResponseError
    if isinstance(inner, aiohttp.ConnectionTimeoutError) or isinstance(error, boto.ConnectTimeoutError):
        return ConnectTimeoutError
    if isinstance(inner, aiohttp.ServerTimeoutError | TimeoutError):
        return ReadTimeoutError
    if isinstance(inner, aiohttp.ClientConnectorError | aiohttp.ClientHttpProxyError):
        return ConnectError
    if isinstance(inner, aiohttp.ClientResponseError | aiohttp.http_exceptions.HttpProcessingError):
        return ProtocolError
    if isinstance(inner, aiohttp.ClientError | OSError):
        return ConnectionLostError
    return TransportError if isinstance(error, boto.BotoCoreError) else InvalidResponseError
