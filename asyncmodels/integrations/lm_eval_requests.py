"""What lm-eval's requests say, in our words: conversations inside of strings, generation arguments, numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Self, TypedDict

from asyncmodels.errors import ConfigurationError, UnsupportedError
from asyncmodels.messages import as_messages
from asyncmodels.types import Message

__all__ = ["Conversation", "Tokens", "generation", "whole"]


class Tokens(TypedDict):
    """The extra by which a local engine is given tokens in place of a text."""

    prompt_token_ids: list[int]


class Conversation(str):
    """Messages where lm-eval wants a string, of which its caches make keys: their JSON."""

    __slots__ = ("messages",)

    messages: tuple[Message, ...]

    @classmethod
    def of(cls, chat: list[dict[str, str]]) -> Self:
        made = cls(json.dumps(chat, ensure_ascii=False))
        made.messages = as_messages(chat)
        return made


_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What lm-eval and tasks call it; the first that is given counts."""
_OWN = frozenset({"top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty", "extra"})
_NEUTRAL: Mapping[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "n": 1}
"""What some tasks spell out, though it changes nothing at this value."""


def generation(gen_kwargs: Mapping[str, Any], default: int) -> dict[str, Any]:
    """A task's ``generation_kwargs`` as parameters of ours; what has no name here goes to the provider as it is.

    Without ``do_sample`` or a temperature it is greedy, as lm-eval has it. Raises ConfigurationError.
    """
    given = dict(gen_kwargs)
    stops = given.pop("until", None) or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise ConfigurationError(f"until must be a text or a list of texts, not {stops!r}.")
    lengths = [given.pop(name, None) for name in _LENGTHS]
    length = next((length for length in lengths if length is not None), default)
    params: dict[str, Any] = {
        "stop_sequences": [stop for stop in stops if stop],
        "max_tokens": whole("max_gen_toks", length, least=1),
    }
    sample = given.pop("do_sample", None)
    temperature = given.pop("temperature", None)
    if sample is False or (sample is None and not temperature):
        params["temperature"] = 0.0
    elif temperature is not None:
        params["temperature"] = temperature
    for name, value in _NEUTRAL.items():
        if name in given and given[name] == value:
            del given[name]
    if "num_beams" in given:
        raise UnsupportedError(f"Beam search (num_beams={given['num_beams']!r}) is not supported.")
    params.update({name: given.pop(name) for name in _OWN & given.keys()})
    if not params.get("top_k", 1):
        del params["top_k"]  # 0 is how Transformers says none
    if given:
        params["extra"] = {**params.get("extra", {}), **given}
    return params


def whole(name: str, value: object, *, least: int = 0) -> int:
    """``value`` as a whole number; command lines give texts. Raises ConfigurationError."""
    try:
        number = int(value) if isinstance(value, int | str) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or number < least:
        raise ConfigurationError(f"{name} must be a whole number of at least {least}, not {value!r}.")
    return number
