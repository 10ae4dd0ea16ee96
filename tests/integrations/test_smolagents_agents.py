"""smolagents' own agents, unchanged, on OpenAIModel against the test server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import pytest
import smolagents
from PIL import Image
from smolagents import CodeAgent, ToolCallingAgent, tool
from smolagents.models import ChatMessageStreamDelta

from asyncmodels.errors import AuthenticationError
from asyncmodels.integrations.smolagents import SmolagentsModel
from asyncmodels.policies.retry import Retry
from asyncmodels.remote.openai import OpenAIModel
from tests.server.handle import Place, Server
from tests.server.script import Answer

Make = Callable[..., SmolagentsModel]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes models at a place of the server, and closes them."""
    made: list[SmolagentsModel] = []

    def on(place: Place, **kwargs: Any) -> SmolagentsModel:
        inner = OpenAIModel("test", api_base=f"{place.url}/v1", api_key="sk-test", **kwargs.pop("inner", {}))
        made.append(SmolagentsModel(inner, **kwargs))
        return made[-1]

    yield on
    for model in made:
        model.close()


def code(text: str) -> str:
    return f"Thought: I know.\n<code>\n{text}\n</code>"


def call(id: str, name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def calls(*made: dict[str, Any]) -> Answer:
    return Answer(content=None, tool_calls=made, finish_reason="tool_calls")


@tool  # type: ignore[untyped-decorator]  # smolagents is not typed
def double(number: int) -> int:
    """Doubles.

    Args:
        number: what to double
    """
    return number * 2


QUIET: dict[str, Any] = {"verbosity_level": -1}
both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@both
def test_a_code_agent_finishes(server: Server, make: Make, stream: bool) -> None:
    """A CodeAgent runs two steps of code, plans before, and returns the answer; usage is counted once per call."""
    place = server.script(
        Answer(content="1. Double."),
        Answer(content=code("print(double(21))").removesuffix("</code>")),
        Answer(content=code("final_answer(double(21))").removesuffix("</code>")),
    )
    agent = CodeAgent([double], make(place), planning_interval=5, stream_outputs=stream, **QUIET)
    result = agent.run("Double 21.", return_full_result=True)
    assert (result.output, result.state) == (42, "success")
    assert result.token_usage.total_tokens == 3 * 12
    json.dumps(result.dict(), default=str)
    requests = [request.json() for request in place.seen().requests]
    assert [bool(request.get("stream")) for request in requests] == [stream] * 3
    assert requests[1]["stop"] == ["Observation:", "Calling tools:", "</code>"]
    assert requests[2]["messages"][-1]["role"] == "user"
    assert "Observation:\nExecution logs:\n42" in requests[2]["messages"][-1]["content"]


@both
def test_what_follows_a_stop_is_not_seen(server: Server, make: Make, stream: bool) -> None:
    """A server that knows no stop sequences may say what it likes: the agent sees none of it."""
    place = server.script(
        Answer(content="1. Double.<end_plan> and more"),
        Answer(content="Thought: none. Observation: invented"),
        Answer(content=code("final_answer(1)") + "\nCalling tools: invented"),
    )
    agent = CodeAgent([], make(place), planning_interval=5, stream_outputs=stream, **QUIET)
    assert agent.run("One.") == 1
    plan, first, last = agent.memory.steps[1:]
    assert "1. Double.\n" in plan.plan
    assert "and more" not in plan.plan
    assert "invented" not in first.model_output + last.model_output


@both
def test_a_tool_calling_agent_finishes(server: Server, make: Make, stream: bool) -> None:
    """A ToolCallingAgent makes parallel native calls, is shown the results, and returns the answer."""
    place = server.script(
        calls(call("a", "double", number=1), call("b", "double", number=2)),
        calls(call("c", "final_answer", answer="6")),
    )
    agent = ToolCallingAgent([double], make(place), stream_outputs=stream, **QUIET)
    assert agent.run("Double.") == "6"
    first, second = (request.json() for request in place.seen().requests)
    assert first["tool_choice"] == "required"
    assert {tool["function"]["name"] for tool in first["tools"]} == {"double", "final_answer"}
    assert second["messages"][-1]["content"].endswith("Observation:\n2\n4")


@both
def test_calls_may_be_written_as_text(server: Server, make: Make, stream: bool) -> None:
    """Where the provider answers with text, several calls in it are made, and a text without any is another step."""
    place = server.script(
        Answer(content="I do not know how to call."),
        Answer(
            content='Action:\n{"name": "double", "arguments": {"number": 3}}\n'
            '{"name": "double", "arguments": {"number": 4}}'
        ),
        Answer(content='{"name": "final_answer", "arguments": {"answer": "14"}}'),
    )
    agent = ToolCallingAgent([double], make(place), stream_outputs=stream, **QUIET)
    assert agent.run("Double.") == "14"
    requests = [request.json() for request in place.seen().requests]
    assert "does not contain any JSON blob" in requests[1]["messages"][-1]["content"]
    assert requests[2]["messages"][-1]["content"].endswith("Observation:\n6\n8")


def test_an_agent_shows_its_pictures(server: Server, make: Make) -> None:
    """The images of a task reach the provider as data URLs, beside its text."""
    place = server.script(Answer(content=code("final_answer('red')")))
    agent = CodeAgent([], make(place), **QUIET)
    assert agent.run("Which colour?", images=[Image.new("RGB", (2, 2), "red")]) == "red"
    text, image = place.seen().requests[0].json()["messages"][1]["content"]
    assert text == {"type": "text", "text": "New task:\nWhich colour?"}
    assert image["image_url"]["url"].startswith("data:image/png;base64,")


def test_structured_outputs(server: Server, make: Make) -> None:
    """A CodeAgent with structured outputs sends the schema, and goes on after an answer that misses it."""
    place = server.script(
        Answer(content="no JSON"),
        Answer(content=json.dumps({"thought": "I know.", "code": "final_answer(double(4))"})),
    )
    agent = CodeAgent([double], make(place), use_structured_outputs_internally=True, **QUIET)
    assert agent.run("Double 4.") == 8
    sent = place.seen().requests[0].json()["response_format"]["json_schema"]
    assert (sent["name"], sorted(sent["schema"]["properties"])) == ("ThoughtAndCodeAnswer", ["code", "thought"])


def test_managed_agents_work_at_the_same_time(server: Server, make: Make) -> None:
    """Two managed agents on one model are called in parallel threads, and their requests are in flight together."""
    met = threading.Barrier(2, timeout=30)

    @tool  # type: ignore[untyped-decorator]  # smolagents is not typed
    def meet() -> str:
        """Waits for the other agent."""
        met.wait()
        return "met"

    team_place = server.script(Answer(content=code('final_answer("done: " + meet())')))
    team_model = make(team_place)
    team = [
        CodeAgent([meet], team_model, name=name, description="Works.", **QUIET) for name in ("researcher", "writer")
    ]
    place = server.script(
        calls(call("a", "researcher", task="Look."), call("b", "writer", task="Write.")),
        calls(call("c", "final_answer", answer="all done")),
    )
    manager = ToolCallingAgent([], make(place), managed_agents=team, **QUIET)
    assert manager.run("Work.") == "all done"
    first, second = (request.json() for request in place.seen().requests)
    assert {tool["function"]["name"] for tool in first["tools"]} == {"researcher", "writer", "final_answer"}
    assert second["messages"][-1]["content"].count("done: met") == 2
    assert len(team_place.seen().requests) == 2


def test_a_code_agent_calls_its_managed_agents(server: Server, make: Make) -> None:
    """A managed agent runs in the thread of the code that calls it, on the same model as its manager."""
    place = server.script(
        Answer(content=code('final_answer(helper(task="Help."))')), Answer(content=code('final_answer("I helped")'))
    )
    model = make(place)
    helper = CodeAgent([], model, name="helper", description="Helps.", **QUIET)
    assert "I helped" in CodeAgent([], model, managed_agents=[helper], **QUIET).run("Ask for help.")


@both
def test_a_failure_that_passes_is_retried(server: Server, make: Make, stream: bool) -> None:
    """An exception would abort the run, so the model's own chain retries."""
    place = server.script(
        Answer(status=503, headers=[("retry-after", "0")]),
        Answer(status=429, headers=[("retry-after", "0")]),
        Answer(content=code("final_answer(1)")),
    )
    assert CodeAgent([], make(place), stream_outputs=stream, **QUIET).run("One.") == 1
    assert len(place.seen().requests) == 3


@both
def test_a_failure_that_stays_is_ours(server: Server, make: Make, stream: bool) -> None:
    """What no retry mends ends the run, with our error as the cause."""
    place = server.script(Answer(status=401, body='{"error": {"message": "no such key"}}'))
    with pytest.raises(smolagents.AgentError, match="no such key") as caught:
        CodeAgent([], make(place), stream_outputs=stream, **QUIET).run("One.")
    assert isinstance(caught.value.__cause__, AuthenticationError)


@pytest.mark.parametrize("fault", ["cut", "reset_in_body", "close"])
def test_a_stream_that_breaks_ends_the_run(server: Server, make: Make, fault: Any) -> None:
    """A stream that stops without an end is an error and not a short answer."""
    place = server.script(Answer(content="Thought: one, two, three, four", fault=fault))
    agent = CodeAgent([], make(place, inner={"retry": False}), stream_outputs=True, **QUIET)
    with pytest.raises(smolagents.AgentError):
        agent.run("One.")


def test_a_silent_stream_ends(server: Server, make: Make) -> None:
    """A stream that falls silent ends after idle_timeout."""
    place = server.script(Answer(fault="hang_in_body", after=2))
    agent = CodeAgent([], make(place, inner={"retry": False}, idle_timeout=0.1), stream_outputs=True, **QUIET)
    with pytest.raises(smolagents.AgentError, match=r"0\.1"):
        agent.run("One.")


async def test_leaving_a_stream_ends_the_request(server: Server, make: Make) -> None:
    """Closing the generator, and leaving the run of an agent that streams, closes the connection at the server."""
    place = server.script(Answer(fault="hang_in_body", after=3))
    model = make(place)
    with closing(model.generate_stream([{"role": "user", "content": "Hello"}])) as stream:
        assert next(stream).content
    await place.until(closed_early=1, in_progress=0)
    agent = CodeAgent([], model, stream_outputs=True, **QUIET)
    # An agent goes on yielding when it is closed, which Python complains about once the stream inside was closed.
    with suppress(RuntimeError), closing(agent.run("One.", stream=True)) as events:
        assert isinstance(next(events), ChatMessageStreamDelta)
    await place.until(closed_early=2, in_progress=0)
    assert model.model.statistics().running == 0


async def test_agents_work_inside_of_a_running_loop(server: Server, make: Make) -> None:
    """In a notebook, whose loop runs, an agent works as anywhere."""
    place = server.script(Answer(content=code("final_answer(1)")))
    assert CodeAgent([], make(place), **QUIET).run("One.") == 1


def test_agents_share_connections(server: Server, make: Make) -> None:
    """Agents that come one after the other, each in a thread of its own, use one connection."""
    place = server.script(Answer(content=code("final_answer(1)")))
    model = make(place)
    for _ in range(5):
        thread = threading.Thread(target=CodeAgent([], model, **QUIET).run, args=("One.",))
        thread.start()
        thread.join()
    assert (len(place.seen().requests), place.seen().connections) == (5, 1)


def test_a_model_with_its_own_chain_keeps_it(server: Server) -> None:
    """The policies are those of the model that was given."""
    place = server.script(Answer(status=503, headers=[("retry-after", "0")]), Answer(content="Hi."))
    inner = OpenAIModel("test", api_base=f"{place.url}/v1", api_key="sk-test", policies=[Retry])
    with SmolagentsModel(inner) as model:
        assert model.generate([{"role": "user", "content": "Hello"}]).content == "Hi."
    assert len(place.seen().requests) == 2
