"""smolagents' agents on SmolLM2, through our engine: the loop ends with an answer or a call that the model gave."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from smolagents import CodeAgent, ToolCallingAgent
from smolagents.agents import EMPTY_PROMPT_TEMPLATES
from smolagents.models import ChatMessageStreamDelta

from asyncmodels.integrations.smolagents import SmolagentsModel

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

# What a model of this size can do: it writes prose where it should write code, and it fills in a form.
FORM = """Fill in this JSON with the color of a ripe banana, and write nothing else:
{"name": "final_answer", "arguments": {"answer": "..."}}"""


@pytest.fixture(scope="module")
def model() -> Iterator[SmolagentsModel]:
    settings = {"temperature": 0.0, "max_tokens": 64, "torch_dtype": "float32"}
    with SmolagentsModel("smollm", settings) as made:
        yield made


def form_agent(model: SmolagentsModel, **settings: Any) -> ToolCallingAgent:
    templates = copy.deepcopy(EMPTY_PROMPT_TEMPLATES)
    templates["system_prompt"] = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    return ToolCallingAgent([], model, prompt_templates=templates, max_steps=1, verbosity_level=-1, **settings)


def test_agents_of_both_kinds_finish_together(model: SmolagentsModel) -> None:
    """A CodeAgent with smolagents' own prompts is told by the model, after its last step, what the answer is; a
    ToolCallingAgent ends with the call of final_answer that the model had to make; both run on one engine at once."""
    coder = CodeAgent([], model, max_steps=1, verbosity_level=-1)
    caller = form_agent(model)
    with ThreadPoolExecutor(2) as threads:
        told = threads.submit(coder.run, "What is the capital of France?", return_full_result=True)
        called = threads.submit(caller.run, FORM, return_full_result=True)
        answer, form = told.result(), called.result()
    assert "Paris" in answer.output
    assert answer.token_usage.output_tokens > 0
    (step,) = caller.memory.steps[1:]
    assert (form.state, step.is_final_answer, step.error) == ("success", True, None)
    assert form.output
    (call,) = step.tool_calls
    assert (call.name, call.arguments) == ("final_answer", {"answer": form.output})
    assert step.model_output_message.tool_calls
    assert model.model.statistics().running == 0


def test_a_streaming_agent_finishes(model: SmolagentsModel) -> None:
    """The same with what the model writes shown as it comes: a call, which has no text."""
    agent = form_agent(model, stream_outputs=True)
    events = list(agent.run(FORM, stream=True))
    deltas = [event for event in events if isinstance(event, ChatMessageStreamDelta)]
    assert "".join(delta.content or "" for delta in deltas) == ""
    calls = [call.function for delta in deltas for call in delta.tool_calls or ()]
    assert [function.name for function in calls if function is not None] == ["final_answer"]
    assert agent.memory.steps[-1].is_final_answer
    assert events[-1].output
