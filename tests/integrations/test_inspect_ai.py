"""inspect_ai's face of a model of ours: what goes in, what comes out, and in which shape."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentAudio,
    ContentData,
    ContentDocument,
    ContentImage,
    ContentReasoning,
    ContentText,
    ContentVideo,
    GenerateConfig,
    ModelOutput,
)
from inspect_ai.tool import ToolCall as InspectToolCall
from inspect_ai.tool import ToolCallError, ToolFunction, ToolInfo, ToolParam, ToolParams

from asyncmodels.backend import Capabilities
from asyncmodels.errors import InvalidRequestError
from asyncmodels.integrations.inspect_ai import inspect_model
from asyncmodels.integrations.inspect_ai_messages import messages_from
from asyncmodels.model import Model
from asyncmodels.policies.cache import Cache
from asyncmodels.policies.single_flight import SingleFlight
from asyncmodels.testing import ScriptedBackend, ScriptItem
from asyncmodels.types import (
    ImagePart,
    Message,
    ProviderPart,
    Request,
    Response,
    TextPart,
    TokenLogprob,
    ToolCall,
    Usage,
)
from tests.integrations.evaluating import at_place, over, scripted
from tests.server.handle import Server
from tests.server.script import Answer

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABh6FO1AAAAABJRU5ErkJggg=="
)
INLINE = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
DOT = ImagePart(data=PNG, media_type="image/png")
ADD = ToolInfo(
    name="add",
    description="Add two numbers.",
    parameters=ToolParams(
        properties={"x": ToolParam(type="integer", description="one"), "y": ToolParam(type="integer")},
        required=["x", "y"],
    ),
)


async def asked(
    input: list[ChatMessage] | str, *, script: ScriptItem | None = None, **settings: Any
) -> tuple[Request, ModelOutput]:
    """The request that came down to the backend, and what inspect_ai got."""
    backend, model = scripted("Hello." if script is None else script)
    output = await model.generate(input, **settings)
    [request] = backend.requests
    return request, output


# -- messages ---------------------------------------------------------------------------------------------------------


async def test_a_conversation_arrives_turn_by_turn() -> None:
    """System, user, assistant and tool messages keep their roles, texts, calls and results."""
    request, _ = await asked(
        [
            ChatMessageSystem(content="Be brief."),
            ChatMessageUser(content=[ContentText(text="What is"), ContentText(text="1 + 2?")]),
            ChatMessageAssistant(
                content="", tool_calls=[InspectToolCall(id="c1", function="add", arguments={"x": 1, "y": 2})]
            ),
            ChatMessageTool(content="3", tool_call_id="c1", function="add"),
            ChatMessageAssistant(content="It is 3."),
            ChatMessageUser(content="Sure?"),
        ],
        tools=[ADD],
    )
    assert request.messages == (
        Message("system", "Be brief."),
        Message("user", "What is\n1 + 2?"),
        Message("assistant", None, tool_calls=(ToolCall("c1", "add", '{"x": 1, "y": 2}'),)),
        Message("tool", "3", tool_call_id="c1"),
        Message("assistant", "It is 3."),
        Message("user", "Sure?"),
    )


async def test_a_tool_that_failed_tells_the_model_why() -> None:
    """The result of a failed tool is its error, as inspect_ai's own providers send it."""
    request, _ = await asked(
        [
            ChatMessageUser(content="Go"),
            ChatMessageAssistant(content="", tool_calls=[InspectToolCall(id="c1", function="add", arguments={})]),
            ChatMessageTool(content="", tool_call_id="c1", error=ToolCallError("timeout", "It took too long.")),
        ],
        tools=[ADD],
    )
    assert request.messages[-1] == Message("tool", "Error: It took too long.", tool_call_id="c1")


def test_images_come_as_data_urls_as_files_and_from_the_web(tmp_path: Path) -> None:
    """An image is read from wherever inspect_ai says it is, and its detail is kept where it is said.

    Newer versions of inspect_ai read files and the web themselves, and let nothing but data: URLs through.
    """
    file = str(tmp_path / "dot.png")
    images = [ContentImage(image=INLINE), ContentImage(image=file), ContentImage(image="https://example.com/dot.png")]
    [message] = messages_from([ChatMessageUser(content=[ContentText(text="Look:"), *images])])
    assert message.content == (TextPart("Look:"), DOT, ImagePart(source=file), ImagePart(url=images[2].image))


async def test_an_image_arrives() -> None:
    """The bytes of an image, and how closely it is to be looked at."""
    request, _ = await asked(
        [ChatMessageUser(content=[ContentImage(image=INLINE), ContentImage(image=INLINE, detail="low")])]
    )
    assert request.messages[0].content == (DOT, replace(DOT, detail="low"))


async def test_images_in_the_results_of_tools_follow_in_a_message_of_the_user() -> None:
    """No chat API takes images from tools, so inspect_ai is told that it has to move them."""
    request, _ = await asked(
        [
            ChatMessageUser(content="Go"),
            ChatMessageAssistant(content="", tool_calls=[InspectToolCall(id="c1", function="add", arguments={})]),
            ChatMessageTool(content=[ContentImage(image=INLINE)], tool_call_id="c1"),
        ],
        tools=[ADD],
    )
    assert [message.role for message in request.messages[2:]] == ["tool", "user"]
    assert request.messages[3].content == (DOT,)


def test_files_are_passed_on_in_the_shape_of_openai(tmp_path: Path) -> None:
    """Sound, video and documents are read and sent as the parts that chat completions have for them."""
    file = tmp_path / "a.wav"
    file.write_bytes(b"RIFF")
    [message] = messages_from(
        [
            ChatMessageUser(
                content=[
                    ContentAudio(audio=str(file), format="wav"),
                    ContentVideo(video="data:video/mp4;base64,AAAA", format="mp4"),
                    ContentDocument(document="data:application/pdf;base64,AAAA", filename="a.pdf"),
                ]
            )
        ]
    )
    assert message.content == (
        ProviderPart({"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}),
        ProviderPart({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}),
        ProviderPart({"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"}}),
    )


async def test_sound_arrives() -> None:
    """A part that only the provider understands goes through inspect_ai and through us."""
    request, _ = await asked(
        [ChatMessageUser(content=[ContentAudio(audio="data:audio/wav;base64,UklGRg==", format="wav")])]
    )
    part = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    assert request.messages[0].content == (ProviderPart(part),)


@pytest.mark.parametrize(
    ("place", "fault"),
    [("/nowhere/a.wav", "cannot be read"), ("https://example.com/a.wav", "not a URL of the web")],
)
def test_a_file_that_is_not_there_is_one_clear_sentence(place: str, fault: str) -> None:
    """A missing file is told with its place in the conversation."""
    with pytest.raises(InvalidRequestError, match=rf"^messages\[0\]\.content\[0\]: the audio .*{fault}"):
        messages_from([ChatMessageUser(content=[ContentAudio(audio=place, format="wav")])])


async def test_what_means_something_to_another_provider_only_is_left_out_with_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Content of another provider's own is dropped, and the log says where."""
    request, _ = await asked(
        [
            ChatMessageUser(content="Go"),
            ChatMessageAssistant(content=[ContentText(text="I see."), ContentData(data={"a": 1})]),
            ChatMessageUser(content="On."),
        ]
    )
    assert request.messages[1].content == (TextPart("I see."),)
    assert "messages[1].content[1] is left out: ContentData" in caplog.text


# -- answers ----------------------------------------------------------------------------------------------------------


async def test_an_answer_with_all_that_there_is_about_it() -> None:
    """Text, usage, log-probabilities, model and the reason for its end arrive in inspect_ai's own fields."""
    response = Response(
        content="Yes",
        finish_reason="stop",
        usage=Usage(100, 20, cached_tokens=80, reasoning_tokens=15),
        model="served-model",
        id="answer-1",
        logprobs=(TokenLogprob("Yes", -0.1, (("Yes", -0.1), ("No", -2.5))), TokenLogprob("!", -1.0)),
    )
    _, output = await asked("Really?", script=response, config=GenerateConfig(logprobs=True, top_logprobs=2))
    assert (output.completion, output.stop_reason, output.model) == ("Yes", "stop", "served-model")
    assert output.message.source == "generate"
    assert output.usage is not None
    assert (output.usage.input_tokens, output.usage.input_tokens_cache_read) == (20, 80)
    assert (output.usage.output_tokens, output.usage.reasoning_tokens, output.usage.total_tokens) == (20, 15, 120)
    logprobs = output.choices[0].logprobs
    assert logprobs is not None
    assert [(entry.token, entry.logprob) for entry in logprobs.content] == [("Yes", -0.1), ("!", -1.0)]
    first = logprobs.content[0].top_logprobs
    assert first is not None
    assert [(top.token, top.logprob) for top in first] == [("Yes", -0.1), ("No", -2.5)]
    assert output.response_id == "answer-1"


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (Response(content="a", finish_reason="stop"), "stop"),
        (Response(content="a", finish_reason="length", usage=Usage(5, 64)), "max_tokens"),
        (Response(content="a", finish_reason="length"), "max_tokens"),
        (Response(content="a", finish_reason="length", usage=Usage(5, 10)), "model_length"),
        (Response(content="a", finish_reason="content_filter"), "content_filter"),
        (Response(tool_calls=(ToolCall("1", "add"),), finish_reason="tool_calls"), "tool_calls"),
        (Response(content="a", finish_reason="error"), "unknown"),
        (Response(content="a"), "unknown"),
    ],
)
async def test_every_end_has_inspects_word(response: Response, reason: str) -> None:
    """An answer that ends before max_tokens for want of room has filled the context, which is another reason."""
    _, output = await asked("Hi", script=response, config=GenerateConfig(max_tokens=64))
    assert output.stop_reason == reason


async def test_parallel_calls_and_one_that_cannot_be_read() -> None:
    """Every call arrives with its arguments; what is no JSON object is an error that inspect_ai shows to the model."""
    calls = (ToolCall("1", "add", '{"x": 1, "y": 2}'), ToolCall("2", "add", '{"x": 1,'), ToolCall("3", "add", "[1]"))
    _, output = await asked("Hi", script=Response(tool_calls=calls, finish_reason="tool_calls"), tools=[ADD])
    found = output.message.tool_calls
    assert found is not None
    assert [(call.id, call.function, call.arguments) for call in found] == [
        ("1", "add", {"x": 1, "y": 2}),
        ("2", "add", {}),
        ("3", "add", {}),
    ]
    assert found[0].parse_error is None
    assert '{"x": 1,' in (found[1].parse_error or "")
    assert "not a JSON object" in (found[2].parse_error or "")


async def test_what_was_thought_comes_back_with_the_next_request() -> None:
    """Reasoning, and what the provider signed it with, bytes among it, go out again in the turn that they belong to."""
    call = ToolCall("1", "add", '{"x": 1}', extra={"extra_content": {"google": {"thought_signature": "sig"}}})
    extra = {"blocks": [{"reasoningContent": {"redactedContent": b"\x00secret"}}]}
    first = Response(reasoning="Hm.", tool_calls=(call,), finish_reason="tool_calls", extra=extra)
    backend, model = scripted(first, "Done.")
    question = ChatMessageUser(content="Go")
    output = await model.generate([question], tools=[ADD])
    reasoning = output.message.content[0]
    assert isinstance(reasoning, ContentReasoning)
    assert reasoning.reasoning == "Hm."
    logged = ChatMessageAssistant.model_validate_json(output.message.model_dump_json())
    await model.generate([question, logged, ChatMessageTool(content="3", tool_call_id="1")], tools=[ADD])
    turn = backend.requests[1].messages[1]
    assert turn == Message("assistant", None, tool_calls=(call,), reasoning="Hm.", extra=extra)
    assert turn.tool_calls[0].extra == call.extra


async def test_a_thought_that_nobody_may_read_comes_back_too() -> None:
    """What a provider wants back without a word that can be shown is kept as redacted reasoning."""
    extra = {"responses_output": [{"type": "reasoning", "encrypted_content": "x"}]}
    backend, model = scripted(Response(content="Yes.", extra=extra), "Done.")
    output = await model.generate("Go")
    reasoning = output.message.content[0]
    assert isinstance(reasoning, ContentReasoning)
    assert reasoning.redacted
    assert output.completion == "Yes."
    await model.generate([ChatMessageUser(content="Go"), output.message, ChatMessageUser(content="On")])
    assert backend.requests[1].messages[1] == Message("assistant", "Yes.", extra=extra)


async def test_reasoning_history_none_takes_the_thoughts_away() -> None:
    """inspect_ai's own setting drops the reasoning, and with it all that belongs to it."""
    backend, model = scripted(Response(content="Yes.", reasoning="Hm.", extra={"reasoning_details": [1]}), "Done.")
    output = await model.generate("Go")
    conversation: list[ChatMessage] = [ChatMessageUser(content="Go"), output.message, ChatMessageUser(content="On")]
    await model.generate(conversation, config=GenerateConfig(reasoning_history="none"))
    assert backend.requests[1].messages[1] == Message("assistant", "Yes.")


async def test_thoughts_in_tags_are_no_part_of_the_answer() -> None:
    """A server that leaves the tags in the text does not mislead a scorer, and gets its text back."""
    backend, model = scripted("<think>\nFour or five?\n</think>\n\nFour.", "Done.")
    output = await model.generate("Go")
    assert output.completion == "Four."
    reasoning = output.message.content[0]
    assert isinstance(reasoning, ContentReasoning)
    assert reasoning.reasoning == "Four or five?"
    await model.generate([ChatMessageUser(content="Go"), output.message, ChatMessageUser(content="On")])
    assert backend.requests[1].messages[1] == Message("assistant", "<think>\nFour or five?\n</think>\n\nFour.")


# -- tools ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "ours"),
    [("auto", "auto"), ("any", "required"), (ToolFunction("add"), "add")],
)
async def test_tools_and_the_choice_among_them(choice: Any, ours: str) -> None:
    """A tool arrives with its schema, the choice in our words."""
    request, _ = await asked("Hi", tools=[ADD], tool_choice=choice)
    [tool] = request.tools
    assert (tool.name, tool.description, request.tool_choice) == ("add", "Add two numbers.", ours)
    assert tool.parameters["required"] == ["x", "y"]
    assert tool.parameters["properties"]["x"] == {"type": "integer", "description": "one"}


async def test_without_a_choice_there_are_no_tools() -> None:
    """inspect_ai takes the tools away where none may be called."""
    request, _ = await asked("Hi", tools=[ADD], tool_choice="none")
    assert (request.tools, request.tool_choice) == ((), None)


async def test_a_model_without_tools_says_so() -> None:
    """Tools for a model that knows none are refused, not dropped."""
    model = over(ScriptedBackend("never", capabilities=Capabilities()))
    with pytest.raises(RuntimeError, match="This model does not support tools"):
        await model.generate("Hi", tools=[ADD])


async def test_samples_that_begin_together_leave_the_loop_its_turns() -> None:
    """What inspect_ai does for all of them before a call, and what is ours, come in different turns of the loop."""
    backend, model = scripted(*["Hello."] * 20)
    question: list[ChatMessage] = [ChatMessageUser(content="Hi")]
    asking = [asyncio.create_task(model.api.generate(question, [], "auto", GenerateConfig())) for _ in range(20)]
    await asyncio.sleep(0)
    assert backend.requests == []
    await asyncio.gather(*asking)
    assert len(backend.requests) == 20


# -- several answers --------------------------------------------------------------------------------------------------


async def test_several_choices_are_several_calls() -> None:
    """Each choice is an answer of its own, with a seed of its own, and all of them are paid for."""
    backend, model = scripted(*[Response(content=text, usage=Usage(5, 1)) for text in ("a", "b", "c")])
    output = await model.generate("Hi", config=GenerateConfig(num_choices=3, seed=7))
    assert sorted(choice.message.text for choice in output.choices) == ["a", "b", "c"]
    assert sorted(request.seed or 0 for request in backend.requests) == [7, 8, 9]
    assert output.usage is not None
    assert (output.usage.input_tokens, output.usage.output_tokens) == (15, 3)


async def test_choices_are_not_taken_from_each_other() -> None:
    """A cache, or a call that others share, does not make one answer of several samples."""
    answers = [Response(content=text, finish_reason="stop") for text in ("a", "b", "c")]
    backend = ScriptedBackend(*answers)
    model = inspect_model(Model(backend, partial(Cache, sampled=True), partial(SingleFlight, sampled=True)))
    output = await model.generate("Hi", config=GenerateConfig(num_choices=3))
    assert sorted(choice.message.text for choice in output.choices) == ["a", "b", "c"]


async def test_the_body_that_is_sent(server: Server) -> None:
    """Down to the wire: OpenAI's JSON, as the settings of the evaluation say it."""
    place = server.script(Answer(content="Hi."))
    config = GenerateConfig(
        temperature=0.5,
        max_tokens=10,
        stop_seqs=["\n"],
        seed=1,
        logit_bias={42: -100},
        parallel_tool_calls=False,
        extra_body={"user": "me"},
    )
    async with at_place(place) as model:
        output = await model.generate("Hello", tools=[ADD], config=config)
    body = place.seen().requests[0].json()
    assert body.pop("tools")[0]["function"]["name"] == "add"
    assert body == {
        "model": "test-model",
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0.5,
        "max_tokens": 10,
        "stop": ["\n"],
        "seed": 1,
        "tool_choice": "auto",
        "logit_bias": {"42": -100.0},
        "parallel_tool_calls": False,
        "user": "me",
    }
    assert output.completion == "Hi."
    assert json.loads(output.model_dump_json())["usage"]["total_tokens"] == 12
