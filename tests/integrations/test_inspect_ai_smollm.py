"""inspect_ai on SmolLM2, through our engine in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig, ResponseSchema, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import ToolFunction
from inspect_ai.util import JSONSchema

from tests.integrations.evaluating import api_of, evaluated, events_of, samples
from tests.integrations.test_inspect_ai_eval import add

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

CAPITALS = [
    Sample(input="What is the capital of France? Answer in one word.", target="Paris"),
    Sample(input="What is the capital of Italy? Answer in one word.", target="Rome"),
]


def test_evaluations_share_one_engine(tmp_path: Path) -> None:
    """Two evaluations in a row, each in a loop of its own, with log-probabilities, a context that is full, a schema and
    a call that is demanded: all on the engine that the first one loaded."""
    model = get_model("asyncmodels/smollm", torch_dtype="float32", config=GenerateConfig(temperature=0.0))
    ours = api_of(model).model
    assert api_of(model).max_connections() == 64
    greedy = GenerateConfig(max_tokens=12, logprobs=True, top_logprobs=2)
    log = evaluated(Task(MemoryDataset(CAPITALS), solver=generate(), scorer=includes(), config=greedy), model, tmp_path)
    assert log.results is not None
    assert log.results.scores[0].metrics["accuracy"].value == 1.0
    for event in events_of(log):
        [choice] = event.output.choices
        assert choice.logprobs is not None
        assert event.output.usage is not None
        assert len(choice.logprobs.content) == event.output.usage.output_tokens
        assert all(entry.logprob <= 0 and len(entry.top_logprobs or ()) == 2 for entry in choice.logprobs.content)
        assert event.call is not None
        assert 0 < (event.call.time or 0) <= (event.working_time or 0) + 0.001

    schema = JSONSchema(type="object", properties={"city": JSONSchema(type="string")}, required=["city"])
    shaped = GenerateConfig(max_tokens=40, response_schema=ResponseSchema(name="answer", json_schema=schema))
    log = evaluated(Task(MemoryDataset(CAPITALS[:1]), solver=generate(), config=shaped), model, tmp_path)
    assert '"city"' in samples(log)[0].output.completion

    called = Task(
        MemoryDataset([Sample(input="Add 1 and 2 with the tool.")]),
        solver=[use_tools(add(), tool_choice=ToolFunction("add")), generate(tool_calls="single")],
        config=GenerateConfig(max_tokens=60),
    )
    log = evaluated(called, model, tmp_path)
    assert [message.role for message in samples(log)[0].messages] == ["user", "assistant", "tool"]

    long = Task(MemoryDataset([Sample(input="word " * 9000)]), solver=generate(), config=GenerateConfig(max_tokens=4))
    log = evaluated(long, model, tmp_path)
    assert log.status == "success"
    assert samples(log)[0].output.stop_reason == "model_length"
    assert ours.statistics().running == 0
