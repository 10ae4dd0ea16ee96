"""The values that travel are frozen, comparable, can be sent between processes, and add up."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmodels import types
from asyncmodels.types import (
    EBNF,
    Allowance,
    Choice,
    Delta,
    ImagePart,
    JSONSchema,
    Message,
    ProviderPart,
    RateLimits,
    Regex,
    Request,
    Response,
    ResponseBuilder,
    ResponseFormat,
    Score,
    TextPart,
    Timing,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallDelta,
    Usage,
)

VALUES: list[Any] = [
    TextPart("a"),
    ImagePart(data=b"png", media_type="image/png"),
    ProviderPart({"type": "file"}),
    ToolCall("1", "look"),
    Message("user", "Hi"),
    Tool("look"),
    ResponseFormat(),
    Regex("a+"),
    EBNF("root ::= 'a'"),
    Choice(("a", "b")),
    JSONSchema({"type": "object"}),
    Request(messages=(Message("user", "Hi"),)),
    Score(" there", "Hello"),
    Usage(1, 2),
    TokenLogprob("a", -0.1),
    Timing(),
    Allowance(limit=60, remaining=59, reset=1.0),
    RateLimits(requests=Allowance(limit=60)),
    Response(content="Hi"),
    ToolCallDelta(0),
    Delta(content="Hi"),
]
BY_NAME = pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)


def test_every_value_is_looked_at() -> None:
    """The list above holds one of each dataclass of types.py."""
    named = {getattr(types, name) for name in types.__all__}

    assert {type(value) for value in VALUES} == {item for item in named if dataclasses.is_dataclass(item)}


@BY_NAME
def test_a_value_is_frozen(value: Any) -> None:
    """No field can be set, and none can be added."""
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)
    with pytest.raises((AttributeError, TypeError)):
        value.another = 1


@BY_NAME
def test_a_value_survives_a_trip(value: Any) -> None:
    """Pickled or copied, a value is equal to itself."""
    assert pickle.loads(pickle.dumps(value)) == value  # noqa: S301  # our own bytes
    assert copy.deepcopy(value) == value
    assert dataclasses.replace(value) == value


@pytest.mark.parametrize(
    "value", [value for value in VALUES if hasattr(value, "__dict__")], ids=lambda value: type(value).__name__
)
def test_the_fast_ways_make_the_same_values(value: Any) -> None:
    """make and evolve, for the values that have no slots, do what the constructor and replace do."""
    given = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}

    assert types.make(type(value), **given) == value
    for name in given:
        changed = types.evolve(value, **{name: "changed"})
        assert (getattr(changed, name), getattr(value, name)) == ("changed", given[name])
        assert changed == dataclasses.replace(value, **{name: "changed"})


# -- messages and tool calls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ("Hi", "Hi"),
        ((), ""),
        ((TextPart("one"), ImagePart(url="https://example.org/a.png"), TextPart("two")), "one\ntwo"),
    ],
)
def test_the_text_of_a_message(content: Any, text: str) -> None:
    """The text is the content, or the lines of its text parts; images count for nothing."""
    assert Message("user", content).text == text


@pytest.mark.parametrize(
    ("written", "parsed"), [('{"city": "Paris", "n": [1]}', {"city": "Paris", "n": [1]}), ("{}", {}), ("", {})]
)
def test_the_arguments_of_a_tool_call(written: str, parsed: dict[str, Any]) -> None:
    """Arguments are parsed as a JSON object; none at all is an empty one."""
    assert ToolCall("1", "look", written).parse_arguments() == parsed


@pytest.mark.parametrize("written", ['{"city": ', "Paris", "[1]", "3", "null", '"text"'])
def test_bad_arguments_of_a_tool_call(written: str) -> None:
    """What is no JSON object is a ValueError that names the tool."""
    with pytest.raises(ValueError, match="'look'"):
        ToolCall("1", "look", written).parse_arguments()


# -- usage ------------------------------------------------------------------------------------------------------------

counts = st.integers(0, 10**9)
usages = st.builds(Usage, counts, counts, st.none() | counts, st.none() | counts)


@given(usages, usages, usages)
def test_usage_adds_up_in_any_order(a: Usage, b: Usage, c: Usage) -> None:
    """Sums do not depend on the order, and totals add up."""
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert (a + b).total_tokens == a.total_tokens + b.total_tokens


@pytest.mark.parametrize(
    ("one", "other", "total"), [(None, None, None), (None, 3, 3), (3, None, 3), (0, None, 0), (1, 2, 3)]
)
def test_unknown_counts_stay_unknown(one: int | None, other: int | None, total: int | None) -> None:
    """A count that neither side knows is unknown in the sum; one known side is enough."""
    sum_ = Usage(1, 1, cached_tokens=one, reasoning_tokens=one) + Usage(
        1, 1, cached_tokens=other, reasoning_tokens=other
    )

    assert (sum_.cached_tokens, sum_.reasoning_tokens) == (total, total)


# -- deltas into a response -------------------------------------------------------------------------------------------


def build(*deltas: Delta) -> Response:
    builder = ResponseBuilder()
    for delta in deltas:
        builder.add(delta)
    return builder.response()


def test_deltas_add_up() -> None:
    """Text is appended, log-probabilities are strung together, and a later value replaces an earlier one."""
    assert build(
        Delta(reasoning="I ", model="m", attempts=1, timing=Timing(queued=1)),
        Delta(reasoning="think", id="1"),
        Delta(content="Hel", logprobs=(TokenLogprob("Hel", -0.1),), usage=Usage(1, 1)),
        Delta(content="lo", logprobs=(TokenLogprob("lo", -0.2),)),
        Delta(finish_reason="stop", usage=Usage(1, 2), attempts=2, timing=Timing(queued=2, total=3), extra={"a": 1}),
    ) == Response(
        content="Hello",
        reasoning="I think",
        finish_reason="stop",
        usage=Usage(1, 2),
        model="m",
        id="1",
        logprobs=(TokenLogprob("Hel", -0.1), TokenLogprob("lo", -0.2)),
        timing=Timing(queued=2, total=3),
        attempts=2,
        extra={"a": 1},
    )


def test_tool_calls_are_told_apart_by_their_index() -> None:
    """Fragments of parallel calls, interleaved and out of order, come together by index, in its order."""
    response = build(
        Delta(tool_calls=(ToolCallDelta(1, "b", "time", extra={"signature": "x"}),)),
        Delta(tool_calls=(ToolCallDelta(0, "a", "weather", '{"ci'), ToolCallDelta(1, arguments="{"))),
        Delta(tool_calls=(ToolCallDelta(1, arguments="}"), ToolCallDelta(0, arguments='ty": 1}'))),
        Delta(finish_reason="tool_calls"),
    )

    time = ToolCall("b", "time", "{}", extra={"signature": "x"})
    assert response.tool_calls == (ToolCall("a", "weather", '{"city": 1}'), time)
    assert response.content is None


def test_calls_without_an_id_stay_apart() -> None:
    """Parallel calls to which the server gave no id get ids of their own."""
    calls = build(Delta(tool_calls=(ToolCallDelta(0, name="a"), ToolCallDelta(1, name="a")))).tool_calls

    assert len({call.id for call in calls}) == 2
    assert all(call.id for call in calls)


def test_nothing_adds_up_to_an_empty_text() -> None:
    """A stream without text and without calls is an empty answer, not none."""
    assert build(Delta(finish_reason="stop")) == Response(content="", finish_reason="stop")


@given(
    st.lists(
        st.builds(
            Delta,
            content=st.text(max_size=3),
            reasoning=st.text(max_size=3),
            tool_calls=st.lists(
                st.builds(ToolCallDelta, st.integers(0, 3), arguments=st.text(max_size=3)), max_size=2
            ).map(tuple),
        ),
        max_size=20,
    )
)
def test_no_piece_is_lost(deltas: list[Delta]) -> None:
    """However an answer is cut into deltas, every character of it arrives, once and in order."""
    response = build(*deltas)

    assert (response.content or "") == "".join(delta.content for delta in deltas)
    assert (response.reasoning or "") == "".join(delta.reasoning for delta in deltas)
    fragments = [call for delta in deltas for call in delta.tool_calls]
    assert [call.arguments for call in response.tool_calls] == [
        "".join(call.arguments for call in fragments if call.index == index)
        for index in sorted({call.index for call in fragments})
    ]


def test_a_response_as_one_delta_adds_up_to_itself() -> None:
    """as_delta turns a whole answer into a stream of one piece."""
    response = Response(
        content="Hi",
        reasoning="hm",
        tool_calls=(ToolCall("a", "look", "{}", extra={"signature": "x"}),),
        finish_reason="stop",
        extra={"reasoning_details": []},
        usage=Usage(1, 2),
        model="m",
        id="1",
        logprobs=(TokenLogprob("Hi", -0.1),),
        timing=Timing(total=1),
        attempts=2,
    )

    assert build(response.as_delta()) == response


def test_a_response_reads_as_its_content() -> None:
    """str gives the text of a response or a delta, and an empty string where there is none."""
    assert (str(Response(content="Hi")), str(Response()), str(Delta(content="Hi"))) == ("Hi", "", "Hi")


def test_raw_objects_and_image_bytes_stay_out_of_repr() -> None:
    """What is large or foreign is not printed, and the raw object does not count when responses are compared."""
    assert "secret" not in repr(Response(content="Hi", raw={"secret": 1}))
    assert Response(content="Hi", raw=1) == Response(content="Hi", raw=2)
    assert "secret" not in repr(ImagePart(data=b"secret"))
