"""What callers write becomes one Request, or one clear sentence."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from typing import Any

import pytest

from asyncmodels.errors import InvalidRequestError
from asyncmodels.request import PARAMETERS, build_request, normalise
from asyncmodels.types import Choice, Message, Regex, Request, Tool

HI = (Message("user", "Hi."),)


def build(**params: Any) -> Request:
    return build_request("Hi.", params, {})


def weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: Which city.
    """
    return city


# -- from what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages",
    [
        "Hi.",
        {"role": "user", "content": "Hi."},
        [{"role": "user", "content": "Hi."}],
        Message("user", "Hi."),
        [Message("user", "Hi.")],
        Request(messages=HI),
    ],
    ids=["string", "dict", "dicts", "message", "messages", "request"],
)
def test_every_shape_of_messages_is_the_same_request(messages: object) -> None:
    """A string, dicts, Messages and a Request of the same text are equal requests."""
    assert build_request(messages, {}, {}) == Request(messages=HI)


def test_every_field_of_request_is_a_parameter() -> None:
    """Each field of Request but the messages has a check, and nothing else has one."""
    assert set(PARAMETERS) == set(Request.__dataclass_fields__) - {"messages"}


def test_values_are_brought_to_the_types_of_request() -> None:
    """Lists become tuples, whole numbers floats where a float is meant, one stop string a tuple of one."""
    request = build(
        stop_sequences="END", temperature=1, top_p=1, timeout=5, tools=[weather], response_format=None, logprobs=True
    )
    assert request.stop_sequences == ("END",)
    assert [type(value) for value in (request.temperature, request.top_p, request.timeout)] == [float, float, float]
    assert isinstance(request.tools[0], Tool)
    assert request.logprobs == 0


# -- who beats whom -----------------------------------------------------------------------------------------------


def test_a_calls_parameters_beat_the_defaults() -> None:
    """A parameter of the call replaces the default, and the other defaults stay."""
    request = build_request("Hi.", {"temperature": 0.0}, normalise({"temperature": 1.0, "seed": 3}))
    assert (request.temperature, request.seed) == (0.0, 3)


@pytest.mark.parametrize("messages", ["Hi.", Request(messages=HI)], ids=["string", "request"])
def test_none_takes_a_default_back(messages: object) -> None:
    """None as a parameter of the call means unset, whatever the default says."""
    defaults = normalise({"temperature": 1.0, "stop_sequences": ["a"], "priority": 2, "extra": {"a": 1}})
    request = build_request(messages, dict.fromkeys(defaults), defaults)
    assert request == Request(messages=HI)


def test_a_request_keeps_what_it_says_and_takes_defaults_for_the_rest() -> None:
    """A Request that is passed on keeps its own fields, and unset ones are filled from the defaults."""
    given = Request(messages=HI, temperature=0.0, extra={"a": 1})
    request = build_request(given, {}, normalise({"temperature": 1.0, "seed": 3, "extra": {"b": 2}}))
    assert (request.temperature, request.seed, request.extra) == (0.0, 3, {"a": 1})


def test_a_calls_parameters_beat_a_request_and_the_defaults() -> None:
    """A parameter given beside a Request replaces the Request's own and the default."""
    given = Request(messages=HI, temperature=0.5)
    request = build_request(given, {"temperature": 0.1, "seed": 1}, normalise({"temperature": 1.0, "seed": 3}))
    assert (request.temperature, request.seed) == (0.1, 1)


def test_a_request_passes_on_unchanged_when_there_is_nothing_to_add() -> None:
    """A Request without anything to fill in is handed down as the same object."""
    given = Request(messages=HI, temperature=0.5)
    assert build_request(given, {}, normalise({"temperature": 1.0})) is given


def test_input_is_never_mutated() -> None:
    """Neither the messages nor any parameter of the caller's is changed."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}]
    params: dict[str, Any] = {
        "stop_sequences": ["a"],
        "extra": {"a": [1]},
        "metadata": {"b": 2},
        "tools": [{"name": "t", "description": "", "parameters": {"type": "object", "properties": {}}}],
    }
    before = copy.deepcopy((messages, params))
    request = build_request(messages, params, {})
    assert (messages, params) == before
    params["extra"]["c"] = 3
    params["stop_sequences"].append("b")
    assert (request.extra, request.stop_sequences) == ({"a": [1]}, ("a",))


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("temprature", "did you mean 'temperature'?"),
        ("max_token", "did you mean 'max_tokens'?"),
        ("stop", "here it is called 'stop_sequences'"),
        ("max_new_tokens", "here it is called 'max_tokens'"),
        ("max_completion_tokens", "here it is called 'max_tokens'"),
        ("extra_body", "here it is called 'extra'"),
        ("thinking", "what only this provider understands goes into extra={...}"),
    ],
)
def test_an_unknown_parameter_comes_with_a_hint(name: str, hint: str) -> None:
    """An unknown name is refused, with the name that was probably meant."""
    with pytest.raises(InvalidRequestError, match=re.escape(hint)) as caught:
        build(**{name: 1})
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"max_tokens": "10"},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 10**400},
        {"temperature": True},
        {"temperature": "0.5"},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"min_p": -0.1},
        {"min_p": 2},
        {"seed": 1.0},
        {"seed": "x"},
        {"frequency_penalty": math.nan},
        {"presence_penalty": "much"},
        {"logprobs": -1},
        {"logprobs": 1.5},
        {"stop_sequences": ""},
        {"stop_sequences": ["a", ""]},
        {"stop_sequences": ["a", 1]},
        {"stop_sequences": 5},
        {"stop_sequences": b"ab"},
        {"stop_sequences": {"a", "b"}},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": math.nan},
        {"attempt_timeout": 0},
        {"idle_timeout": math.inf},
        {"priority": 1.5},
        {"agent": ""},
        {"agent": 7},
        {"metadata": ["a"]},
        {"metadata": {1: "a"}},
        {"extra": "a"},
        {"tools": 5},
        {"tools": [5]},
        {"tools": [weather, weather]},
        {"response_format": "xml"},
        {"response_format": {"hello": 1}},
        {"grammar": "a|b"},
        {"grammar": Choice(())},
        {"grammar": Regex("a")} | {"response_format": "json"},
        {"tool_choice": "required"},
        {"tool_choice": "weather"},
        {"tool_choice": "clock", "tools": [weather]},
        {"tool_choice": 5, "tools": [weather]},
        {"tool_choice": "required", "tools": [weather], "grammar": Choice(("a",))},
        {"tool_choice": "weather", "tools": [weather], "grammar": Choice(("a",))},
    ],
)
def test_bad_parameters_are_one_sentence(params: dict[str, Any]) -> None:
    """What can never work is an InvalidRequestError of one sentence that names the parameter."""
    with pytest.raises(InvalidRequestError) as caught:
        build(**params)
    text = str(caught.value)
    assert any(name.removesuffix("s") in text or name == "response_format" for name in params)
    assert text.endswith((".", "?", "'"))
    assert "\n" not in text


@pytest.mark.parametrize(
    "messages",
    [
        [],
        (),
        None,
        5,
        b"Hi.",
        {"content": "Hi."},
        [{"role": "king", "content": "Hi."}],
        ["Hi."],
        [{"role": "user", "content": None}],
    ],
)
def test_bad_messages_are_one_sentence(messages: object) -> None:
    """Messages that cannot be understood are an InvalidRequestError of one sentence."""
    with pytest.raises(InvalidRequestError) as caught:
        build_request(messages, {}, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "request_",
    [
        Request(messages=()),
        Request(messages=HI, max_tokens=0),
        Request(messages=HI, temperature=math.nan),
        Request(messages=HI, stop_sequences=("",)),
        Request(messages=("Hi.",)),  # type: ignore[arg-type]  # what a caller without a type checker may write
        Request(messages=HI, tool_choice="required"),
        Request(messages=HI, grammar=Choice(("a",)), response_format="json"),  # type: ignore[arg-type]  # the same
    ],
    ids=lambda request: repr(request)[:80],
)
def test_a_request_made_by_hand_is_checked_too(request_: Request) -> None:
    """A Request is checked like the parameters that it stands for."""
    with pytest.raises(InvalidRequestError):
        build_request(request_, {}, {})


def test_a_request_made_by_hand_may_be_as_loose_as_parameters() -> None:
    """What parameters may be written as, a Request by hand may hold too: it is brought to the same values."""
    loose = Request(messages=[{"role": "user", "content": "Hi."}], tools=[weather], stop_sequences=["a"])  # type: ignore[arg-type]  # a caller without a type checker
    assert build_request(loose, {}, {}) == build(tools=[weather], stop_sequences=["a"])


def test_contradictions_between_defaults_and_call_are_found() -> None:
    """A grammar of the call and a response format of the defaults contradict each other as two of one call do."""
    with pytest.raises(InvalidRequestError, match="response_format and grammar"):
        build_request("Hi.", {"grammar": Choice(("a",))}, normalise({"response_format": "json"}))


def test_a_default_is_checked_where_it_is_given() -> None:
    """A bad default is refused when the model is made, not at its first call."""
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        normalise({"max_tokens": 0})


@dataclass
class City:
    name: str


def test_response_formats_and_tools_keep_their_source() -> None:
    """A type becomes a format that parses to it, a function a tool that knows its function."""
    request = build(response_format=City, tools=[weather], tool_choice="weather")
    assert request.response_format is not None
    assert request.response_format.parse('{"name": "Paris"}') == City("Paris")
    assert request.tools[0].function is weather
    assert request.tool_choice == "weather"
