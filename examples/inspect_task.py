"""A task for inspect_ai, answered by any model of asyncmodels.

    pip install "asyncmodels[inspect,smollm]"
    inspect eval examples/inspect_task.py --model asyncmodels/smollm
    inspect eval examples/inspect_task.py --model asyncmodels/openai/gpt-5 -M max_concurrency=200

Or from Python, as below, with a model that is made here: python examples/inspect_task.py
"""

from __future__ import annotations

import inspect_ai
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

from asyncmodels import Model, load
from asyncmodels.integrations.inspect_ai import inspect_model

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo"}


@task
def capitals() -> Task:
    questions = [
        Sample(input=f"What is the capital of {country}? Answer in one word.", target=capital)
        for country, capital in CAPITALS.items()
    ]
    return Task(dataset=questions, solver=generate(), scorer=includes())


def evaluate(model: Model) -> float:
    """The share of the capitals that the model knows."""
    [log] = inspect_ai.eval(capitals(), model=inspect_model(model), max_tokens=12, temperature=0.0, display="none")
    assert log.results is not None, log.error
    return float(log.results.scores[0].metrics["accuracy"].value)


if __name__ == "__main__":
    print(f"SmolLM2 knows {evaluate(load('smollm')):.0%} of the capitals.")
