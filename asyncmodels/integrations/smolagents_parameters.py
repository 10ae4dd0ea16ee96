"""The parameters that smolagents and its users write -> those of our models."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from smolagents.models import REMOVE_PARAMETER

from asyncmodels.errors import ConfigurationError
from asyncmodels.formats import as_response_format
from asyncmodels.request import PARAMETERS, normalise

__all__ = ["REMOVED", "checked", "merged", "unchecked", "unwritten"]

REMOVED = "REMOVE_PARAMETER"
"""How the sentinel is written into JSON."""
_RENAMED = {
    "stop": "stop_sequences",
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "top_logprobs": "logprobs",
    "extra_body": "extra",
}
_OF_THE_MODEL = frozenset(
    {
        "api_base",
        "api_key",
        "azure_endpoint",
        "api_version",
        "base_url",
        "bill_to",
        "client",
        "client_kwargs",
        "http_client",
        "max_concurrency",
        "organization",
        "policies",
        "project",
        "provider",
        "requests_per_minute",
        "retry",
        "token",
        "tokens_per_minute",
    }
)
_OF_A_CALL = frozenset({"messages", "stream", "tools_to_call_from"})


def checked(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of every call, as the constructor got them.

    Raises ConfigurationError for those that can never work and those that look like a slip of the pen, and
    InvalidRequestError for a value that is none.
    """
    kwargs = unwritten(kwargs)
    for name in kwargs:
        if name in _OF_THE_MODEL:
            raise ConfigurationError(f"{name!r} belongs to the model inside: give it to that, or in model_kwargs.")
        if name in _OF_A_CALL:
            raise ConfigurationError(f"{name!r} belongs to a call and cannot be set for all of them.")
        if name in PARAMETERS or name in _RENAMED:
            continue
        close = difflib.get_close_matches(name, (*PARAMETERS, *_RENAMED), n=1, cutoff=0.88)
        if close:
            raise ConfigurationError(
                f"Unknown parameter {name!r}: did you mean {close[0]!r}? What only a provider knows and is called so "
                "goes into extra={...}."
            )
    normalise(merged({}, {}, kwargs))
    return kwargs


def unwritten(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with the sentinel where its name stands."""
    return {name: REMOVE_PARAMETER if _is_removed(value) else value for name, value in kwargs.items()}


def _is_removed(value: Any) -> bool:
    return isinstance(value, str) and value == REMOVED


def merged(own: Mapping[str, Any], call: Mapping[str, Any], constructor: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in our names, the constructor's over the call's over those of the agent."""
    params = dict(own)
    extra: dict[str, Any] = {}
    for source in (call, constructor):
        for given, value in source.items():
            name = _RENAMED.get(given, given)
            if value is REMOVE_PARAMETER:
                params.pop(name, None)
                extra.pop(name, None)
            elif name == "extra":
                extra.update(value or {})
            elif name == "logprobs" and value is True and params.get(name):
                continue  # top_logprobs says how many
            elif name in PARAMETERS:
                params[name] = value
            else:
                extra[name] = value
    if extra:
        params["extra"] = extra
    return params


def unchecked(response_format: Any) -> Any:
    """The format without a check of the answer: an agent reads it itself, and lets the model mend what is wrong."""
    format = as_response_format(response_format)
    return None if format is None else replace(format, parse=str)
