"""Every field of inspect_ai's GenerateConfig: what it becomes, or what is said about it."""

from __future__ import annotations

from typing import Any

import pytest
from inspect_ai.model import GenerateConfig, ResponseSchema
from inspect_ai.tool import ToolInfo
from inspect_ai.util import JSONSchema

from asyncmodels.errors import UnsupportedError
from asyncmodels.integrations import inspect_ai_parameters
from asyncmodels.integrations.inspect_ai_parameters import FIELDS, parameters_from
from asyncmodels.types import Request
from tests.integrations.evaluating import scripted

ADD = ToolInfo(name="add", description="Add.")


async def asked(**fields: Any) -> Request:
    backend, model = scripted("Hello.")
    await model.generate("Hi", config=GenerateConfig(**fields))
    return backend.requests[0]


def test_no_field_is_forgotten() -> None:
    """A field that a new version of inspect_ai brings must be given its row."""
    assert set(GenerateConfig.model_fields) - set(FIELDS) == set()


async def test_fields_of_the_same_meaning() -> None:
    """What we have a parameter for arrives as that parameter."""
    request = await asked(
        timeout=60,
        max_tokens=10,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        seed=3,
        stop_seqs=["END"],
        frequency_penalty=0.1,
        presence_penalty=0.2,
        extra_body={"min_p": 0.1},
    )
    assert (request.timeout, request.max_tokens, request.temperature, request.top_p) == (60.0, 10, 0.5, 0.9)
    assert (request.top_k, request.seed, request.stop_sequences) == (5, 3, ("END",))
    assert (request.frequency_penalty, request.presence_penalty) == (0.1, 0.2)
    assert request.extra == {"min_p": 0.1}


async def test_nothing_set_is_nothing_said() -> None:
    """An empty configuration leaves everything to the model."""
    request = await asked()
    assert request == Request(messages=request.messages)


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 5}, 5),
        ({"top_logprobs": 3}, 3),
        ({"logprobs": False}, None),
        ({}, None),
    ],
)
async def test_log_probabilities(fields: dict[str, Any], logprobs: int | None) -> None:
    """One number of ours says what two fields of inspect_ai's say."""
    assert (await asked(**fields)).logprobs == logprobs


async def test_a_schema_shapes_the_answer_and_does_not_check_it() -> None:
    """The schema goes to the model; an answer that does not satisfy it is for the scorer, and no error."""
    schema = JSONSchema(type="object", properties={"a": JSONSchema(type="integer")}, required=["a"])
    backend, model = scripted("not JSON")
    asked = ResponseSchema(name="thing", json_schema=schema, strict=True)
    output = await model.generate("Hi", config=GenerateConfig(response_schema=asked))
    form = backend.requests[0].response_format
    assert form is not None
    assert (form.name, form.strict) == ("thing", True)
    assert form.schema is not None
    assert (form.schema["type"], form.schema["required"]) == ("object", ["a"])
    assert form.schema["properties"] == {"a": {"type": "integer"}}
    assert output.completion == "not JSON"


@pytest.mark.parametrize(
    ("fields", "extra"),
    [
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"verbosity": "high"}, {"verbosity": "high"}),
        ({"logit_bias": {1: -100}}, {"logit_bias": {"1": -100.0}}),
        ({"parallel_tool_calls": False}, {}),
        ({"reasoning_summary": "none", "reasoning_mode": "standard"}, {}),
    ],
)
def test_fields_that_are_the_providers_own(fields: dict[str, Any], extra: dict[str, Any]) -> None:
    """They go into ``extra`` in the words of chat completions; what is about tools only where there are tools."""
    assert parameters_from(GenerateConfig(**fields), tools=False, responses=False).get("extra", {}) == extra


def test_fields_of_the_responses_api() -> None:
    """The same in the words of the Responses API; the user's own words go before."""
    config = GenerateConfig(
        reasoning_effort="low",
        reasoning_summary="auto",
        verbosity="low",
        extra_body={"reasoning": {"summary": "detailed"}, "store": False},
    )
    assert parameters_from(config, tools=False, responses=True)["extra"] == {
        "reasoning": {"effort": "low", "summary": "detailed"},
        "text": {"verbosity": "low"},
        "store": False,
    }


def test_tools_one_at_a_time() -> None:
    """Whether calls may be parallel is said where there are tools."""
    config = GenerateConfig(parallel_tool_calls=False)
    assert parameters_from(config, tools=True, responses=False)["extra"] == {"parallel_tool_calls": False}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"best_of": 2}, "best_of"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"fallback_models": ["other"]}, "fallback_models"),
        ({"modalities": ["image"]}, "modalities"),
    ],
)
def test_what_cannot_be_had_is_refused(fields: dict[str, Any], name: str) -> None:
    """A field that would change the answer, and that we have nothing for, is an error before anything is sent."""
    with pytest.raises(UnsupportedError, match=f"does not support {name}: "):
        parameters_from(GenerateConfig(**fields), tools=False, responses=False)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"stream_idle_timeout": 5}, "stream_idle_timeout"),
        ({"internal_tools": True}, "internal_tools"),
        ({"cache_prompt": False}, "cache_prompt"),
        ({"effort": "low"}, "effort"),
        ({"reasoning_tokens": 100}, "reasoning_tokens"),
        ({"batch": True}, "batch"),
        ({"reasoning_summary": "auto"}, "reasoning_summary"),
        ({"reasoning_mode": "pro"}, "reasoning_mode"),
    ],
)
def test_what_changes_nothing_is_said_once(
    fields: dict[str, Any], name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hint that means nothing here is told in one warning, not in one for each sample."""
    monkeypatch.setattr(inspect_ai_parameters, "_warned", set())
    for _ in range(3):
        assert parameters_from(GenerateConfig(**fields), tools=False, responses=False) == {}
    assert [record.message.split()[0] for record in caplog.records] == [name]


@pytest.mark.parametrize(
    "fields", [{"cache_prompt": "auto"}, {"cache_prompt": True}, {"batch": False}, {"internal_tools": False}]
)
def test_what_happens_anyhow_needs_no_word(
    fields: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hint that asks for what is so in any case is no cause for a warning."""
    monkeypatch.setattr(inspect_ai_parameters, "_warned", set())
    assert parameters_from(GenerateConfig(**fields), tools=False, responses=False) == {}
    assert caplog.records == []


async def test_a_system_message_of_the_configuration_is_inspects_part() -> None:
    """It arrives as the first message."""
    request = await asked(system_message="Be brief.")
    assert [message.role for message in request.messages] == ["system", "user"]
