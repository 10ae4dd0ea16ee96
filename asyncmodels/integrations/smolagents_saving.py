"""A model as plain data that can be written into an agent's folder and made again; secrets are never written.

A model is described by the name and the parameters with which ``asyncmodels.load`` makes it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from asyncmodels.errors import ConfigurationError
from asyncmodels.model import Model
from asyncmodels.recipe import constructor_arguments
from asyncmodels.registry import Scheme, schemes

__all__ = ["described", "writable"]

logger = logging.getLogger(__name__)


def described(model: Model) -> tuple[str, dict[str, Any]]:
    """The name and the parameters with which ``load`` makes a model like this one, as they were given.

    Raises ConfigurationError for a model of a class that no scheme stands for.
    """
    cls = type(model)
    target = f"{cls.__module__}:{cls.__qualname__}"
    arguments = constructor_arguments(model)
    rows = [row for row in schemes() if row.target == target and _agrees(row, arguments)]
    if not rows:
        raise ConfigurationError(
            f"An agent with this model cannot be saved: a {cls.__name__} is made by no scheme of asyncmodels.load. "
            'Give SmolagentsModel a name instead of the model, such as "openai:gpt-5", or add a scheme for the class.'
        )
    # The row that says most: "groq" and not "openai" for a model of Groq's; of two names for one thing the longer.
    row = max(rows, key=lambda row: (len(row.params), len(row.scheme)))
    name = f"{row.scheme}:{arguments.pop(next(iter(arguments)))}" if row.named else row.scheme
    return name, {key: value for key, value in arguments.items() if key not in row.params}


def _agrees(row: Scheme, arguments: Mapping[str, Any]) -> bool:
    return all(name in arguments and arguments[name] == value for name, value in row.params.items())


def writable(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``parameters`` that can be written as JSON and is no secret; the rest is named in a warning."""
    left_out: list[str] = []
    secrets = frozenset(text for text in _secrets(parameters) if len(text) >= _SHORTEST)
    kept = _written(parameters, "", secrets, left_out)
    if left_out:
        logger.warning(
            "Left out of what is saved, because it is a secret or cannot be written as JSON: %s. Set the provider's "
            "environment variables, or give the loaded agent a model of your own.",
            ", ".join(left_out),
        )
    return kept if isinstance(kept, dict) else {}


# -- what is a secret -------------------------------------------------------------------------------------------------

_SECRET_WORDS = frozenset(
    {
        "apikey",
        "auth",
        "authorization",
        "bearer",
        "cookie",
        "credential",
        "credentials",
        "headers",  # whoever adds headers most often adds a key
        "key",
        "passphrase",
        "passwd",
        "password",
        "secret",
        "sig",
        "signature",
        "token",
    }
)
_NO_SECRETS = frozenset({"prompt_cache_key", "tool_name_key", "tool_arguments_key"})
# How the keys of well-known providers begin, for those that stand where no key belongs.
_KEY = re.compile(r"(?i)\b(sk-|hf_|gsk_|xai-|r8_|akia|asia|bearer\s|basic\s|eyj)[\w+/=.-]{8}")
_SHORTEST = 6
"""A secret of fewer characters is not looked for in other values: it would be found in every word."""


def _is_secret_name(name: str) -> bool:
    if name in _NO_SECRETS:
        return False
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return not _SECRET_WORDS.isdisjoint(words)


def _is_numbers(value: Any) -> bool:
    """Whether ``value`` is of numbers alone, as ``stop_token_ids`` are: no key is."""
    if isinstance(value, list | tuple):
        return all(map(_is_numbers, value))
    return value is None or isinstance(value, int | float)


def _secrets(value: Any, *, inside: bool = False) -> Iterator[str]:
    """Every string that stands under the name of a secret."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _secrets(item, inside=inside or _is_secret_name(str(key)))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _secrets(item, inside=inside)
    elif inside and isinstance(value, str):
        yield value


# -- what can be written ----------------------------------------------------------------------------------------------

_NOTHING: Any = object()


def _written(value: Any, where: str, secrets: frozenset[str], left_out: list[str]) -> Any:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, Mapping):
        kept = {}
        for key, item in value.items():
            name = str(key.value if isinstance(key, Enum) else key)
            place = f"{where}.{name}" if where else name
            if _is_secret_name(name) and not _is_numbers(item):
                left_out.append(place)
                continue
            written = _written(item, place, secrets, left_out)
            if written is not _NOTHING:
                kept[name] = written
        return kept
    if isinstance(value, list | tuple):
        items = [_written(item, f"{where}[{index}]", secrets, left_out) for index, item in enumerate(value)]
        return [item for item in items if item is not _NOTHING]
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    text = _text(value)
    if text is not None and text != (text := _without_secrets(text)):
        left_out.append(f"the keys in the URL {where}")
    if text is None or _KEY.search(text) or any(secret in text for secret in secrets):
        left_out.append(where)
        return _NOTHING
    return text


def _text(value: Any) -> str | None:
    if isinstance(value, str | PurePath):
        return str(value)
    # torch.float32 and torch.device("cpu"), which have names that models take as well
    return str(value).removeprefix("torch.") if type(value).__module__ == "torch" else None


def _without_secrets(text: str) -> str:
    """A URL without the user, the password and the keys that it may carry; any other text as it is."""
    if "://" not in text:
        return text
    try:
        parts = urlsplit(text)
        query = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        return text
    host = parts.netloc.rpartition("@")[2]
    kept = [(name, value) for name, value in query if not _is_secret_name(name)]
    if host == parts.netloc and len(kept) == len(query):
        return text
    return urlunsplit(parts._replace(netloc=host, query=urlencode(kept)))
