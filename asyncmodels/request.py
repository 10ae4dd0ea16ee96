"""What a caller wrote becomes one frozen Request: names checked, values normalised, contradictions refused."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypedDict

from asyncmodels.errors import InvalidRequestError
from asyncmodels.formats import as_grammar, as_response_format
from asyncmodels.messages import as_messages
from asyncmodels.tools import as_tool_choice, as_tools
from asyncmodels.types import Grammar, Request, Score, evolve, make

__all__ = ["PARAMETERS", "Parameters", "UntimedParameters", "build_request", "normalise"]


class UntimedParameters(TypedDict, total=False):
    """``Parameters`` without ``timeout``, for a function that has a parameter of that name already."""

    stop_sequences: Sequence[str] | str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    frequency_penalty: float | None
    presence_penalty: float | None
    logprobs: int | bool | None
    tools: Sequence[Any] | None
    """Python functions, JSON schemas in OpenAI's shape, smolagents-like objects, Tool values."""
    tool_choice: Any
    """``"auto"``, ``"none"``, ``"required"``, or a tool by its name or itself."""
    response_format: Any
    """``"json"``, a pydantic model class, a dataclass, a JSON schema, or OpenAI's dict."""
    grammar: Grammar | None
    score: Score | str | Sequence[int] | None
    """A given continuation, text or token ids, to be scored instead of an answer; see ``Model.score``."""
    attempt_timeout: float | None
    idle_timeout: float | None
    priority: int | None
    agent: str | None
    metadata: Mapping[str, Any] | None
    extra: Mapping[str, Any] | None


class Parameters(UntimedParameters, total=False):
    """The keyword arguments of ``generate`` and ``stream``, which are the fields of ``Request`` as callers write them.

    None means "unset" for each: it takes a model's own default back for one call.
    """

    timeout: float | None


def build_request(messages: Any, params: Mapping[str, Any], defaults: Mapping[str, Any]) -> Request:
    """The Request for ``messages``: the call's own ``params`` beat ``defaults`` (already normalised).

    ``messages`` may be a Request: it is checked like parameters, and what it leaves unset is filled from ``defaults``.
    Raises InvalidRequestError in one sentence for whatever can never work.
    """
    values = normalise(params) if params else {}
    if isinstance(messages, Request):
        request = _checked(messages)
        if values.get("score") or request.score is not None:
            return _scoring(evolve(request, **values), defaults)
        unset = {name: value for name, value in defaults.items() if getattr(request, name) == _UNSET[name]}
        if unset or values:
            request = evolve(request, **{**unset, **values})
    elif values.get("score"):
        given = () if values["score"].prompt is not None and messages == () else as_messages(messages)
        return _scoring(make(Request, messages=given, **{**_BARE, **values}), defaults)
    else:
        request = make(Request, messages=as_messages(messages), **{**_BARE, **defaults, **values})
    if request.tools or request.tool_choice is not None or request.grammar is not None:
        request = _check_together(request)
    return request


def normalise(params: Mapping[str, Any], *, beside: Iterable[str] = ()) -> dict[str, Any]:
    """Checks each parameter by itself and brings it to the type that Request holds.

    ``beside`` are the other keywords of who was called, which a misspelt one may have meant.
    """
    values: dict[str, Any] = {}
    for name, value in params.items():
        check = _CHECKS.get(name)
        if check is None:
            raise InvalidRequestError(_unknown(name, beside))
        # None means "unset" for every parameter: it takes a model's default back for one call.
        values[name] = _UNSET[name] if value is None else check(name, value)
    return values


def _checked(request: Request) -> Request:
    """The same object where it is sound already, as every request is that another Model hands down."""
    given = {name: value for name in _CHECKS if (value := getattr(request, name)) != _UNSET[name]}
    changes = {
        name: value
        for name, value in normalise(given).items()
        if value is not given[name] and (type(value) is not type(given[name]) or value != given[name])
    }
    bare = not request.messages and request.score is not None and request.score.prompt is not None
    messages = () if bare else as_messages(request.messages)
    if len(messages) != len(request.messages) or not all(map(operator.is_, messages, request.messages)):
        changes["messages"] = messages
    return evolve(request, **changes) if changes else request


def _scoring(request: Request, defaults: Mapping[str, Any]) -> Request:
    """The request for a score: of the model's defaults it has those alone that are not about how to answer."""
    assert request.score is not None  # noqa: S101  # or there would be nothing to score
    if request.score.prompt is not None and request.messages:
        raise InvalidRequestError("A score continues its own prompt or messages, not both; give one of them.")
    for name in _CHECKS.keys() - _BESIDE_SCORE:
        if getattr(request, name) != _UNSET[name]:
            raise InvalidRequestError(f"{name} means nothing where a given continuation is scored.")
    unset = {
        name: value
        for name, value in defaults.items()
        if name in _BESIDE_SCORE and getattr(request, name) == _UNSET[name]
    }
    # With the best token at each place it can be said whether the continuation is what greedy decoding would say.
    request = evolve(request, **unset)
    return evolve(request, logprobs=max(1, request.logprobs or 0))


_BESIDE_SCORE = frozenset(
    {"score", "logprobs", "timeout", "attempt_timeout", "idle_timeout", "priority", "agent", "metadata", "extra"}
)


def _check_together(request: Request) -> Request:
    if request.grammar is not None and request.response_format is not None:
        raise InvalidRequestError("response_format and grammar both say what the content must be; give one of them.")
    choice = as_tool_choice(request.tool_choice, request.tools)
    if request.grammar is not None and choice not in (None, "none", "auto"):
        raise InvalidRequestError(
            f"tool_choice={choice!r} demands a tool call, which no grammar for the content allows."
        )
    return request if choice == request.tool_choice else evolve(request, tool_choice=choice)


def _unknown(name: str, beside: Iterable[str]) -> str:
    if name in _FOREIGN:
        return f"Unknown parameter {name!r}: here it is called {_FOREIGN[name]!r}."
    close = difflib.get_close_matches(name, [*PARAMETERS, *beside], n=1)
    hint = f"did you mean {close[0]!r}?" if close else "what only this provider understands goes into extra={...}."
    return f"Unknown parameter {name!r}: {hint}"


# What other libraries call ours, for the hint; accepting two spellings would let them contradict each other.
_FOREIGN = {
    "stop": "stop_sequences",
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "tools_to_call_from": "tools",
    "functions": "tools",
    "top_logprobs": "logprobs",
    "random_seed": "seed",
    "user": "agent",
    "extra_body": "extra",
    "request_timeout": "timeout",
}


# -- one check per parameter ------------------------------------------------------------------------------------------

_LARGEST = 1e300  # an int may be larger than any float


def _number(low: float, high: float = math.inf, *, open_low: bool = False) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidRequestError(f"{name} must be a number, not {type(value).__name__}.")
        inside = low < value <= high if open_low else low <= value <= high
        if not inside or not value < _LARGEST:
            bound = f"more than {low:g}" if open_low else f"at least {low:g}"
            upper = "" if high == math.inf else f" and at most {high:g}"
            raise InvalidRequestError(f"{name} must be {bound}{upper}, not {value!r}.")
        return float(value)

    return check


def _integer(low: int | None = None) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidRequestError(f"{name} must be a whole number, not {value!r}.")
        if low is not None and value < low:
            raise InvalidRequestError(f"{name} must be at least {low}, not {value}.")
        return value

    return check


def _finite(name: str, value: Any) -> float:
    return _number(-1e6, 1e6)(name, value)


def _stop_sequences(name: str, value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequestError(f"{name} must be a list of strings.")
    if not all(stops):
        raise InvalidRequestError(f"{name} must not contain an empty string.")
    return tuple(stops)


def _logprobs(name: str, value: Any) -> int | None:
    if isinstance(value, bool):
        return 0 if value else None
    return _integer(0)(name, value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequestError(f"{name} must be a string that is not empty.")
    return value


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InvalidRequestError(f"{name} must be a dict with strings as keys.")
    return dict(value)


def _score(name: str, value: Any) -> Score:
    given = value if isinstance(value, Score) else Score(value)
    continuation = _text_or_tokens(f"The continuation of {name}", given.continuation)
    if not continuation:
        raise InvalidRequestError("The continuation is empty: there is nothing to score.")
    prompt = None if given.prompt is None else _text_or_tokens(f"The prompt of {name}", given.prompt)
    return Score(continuation, prompt)


def _text_or_tokens(name: str, value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or not all(type(token) is int and token >= 0 for token in value):
        raise InvalidRequestError(f"{name} must be a text or token ids, whole numbers from 0 on.")
    return tuple(value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "stop_sequences": _stop_sequences,
    "max_tokens": _integer(1),
    "temperature": _number(0),
    "top_p": _number(0, 1, open_low=True),
    "top_k": _integer(1),
    "min_p": _number(0, 1),
    "seed": _integer(),
    "frequency_penalty": _finite,
    "presence_penalty": _finite,
    "logprobs": _logprobs,
    "tools": lambda _name, value: as_tools(value),
    "tool_choice": lambda _name, value: value,  # means something only beside the tools: checked with them
    "response_format": lambda _name, value: as_response_format(value),
    "grammar": lambda _name, value: as_grammar(value),
    "score": _score,
    "timeout": _number(0, open_low=True),
    "attempt_timeout": _number(0, open_low=True),
    "idle_timeout": _number(0, open_low=True),
    "priority": _integer(),
    "agent": _text,
    "metadata": _mapping,
    "extra": _mapping,
}

_UNSET: dict[str, Any] = {
    field.name: {} if field.default is MISSING else field.default
    for field in fields(Request)
    if field.name != "messages"
}

_BARE: dict[str, Any] = {name: value for name, value in _UNSET.items() if value == {}}  # what make() must be given

PARAMETERS = tuple(sorted(_CHECKS))
"""The names of all parameters of ``generate`` and ``stream``."""
