"""Small tasks for lm-eval in files of their own, so that nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

__all__ = ["TASKS", "evaluate", "write_tasks"]

DOCS: list[dict[str, Any]] = [
    {"question": "What is the capital of France?", "choices": ["Rome", "Paris", "Oslo"], "gold": 1},
    {"question": "What do bees make?", "choices": ["honey", "a lot of wool", "glass"], "gold": 0},
    {"question": "How many legs has a spider?", "choices": ["two", "six", "eight"], "gold": 2},
    {"question": "Which one is a colour?", "choices": ["blue", "seven"], "gold": 0},
]
TASKS = {
    "am_choice": """
        output_type: multiple_choice
        doc_to_text: "Question: {{question}}\\nAnswer:"
        doc_to_choice: choices
        doc_to_target: gold
        metric_list: [{metric: acc}, {metric: acc_norm}]
        """,
    "am_rolling": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{question}}"
        metric_list: [{metric: word_perplexity}]
        """,
    "am_generate": """
        output_type: generate_until
        doc_to_text: "Question: {{question}}\\nAnswer:"
        doc_to_target: "{{choices[gold]}}"
        generation_kwargs: {until: ["\\n", "."], max_gen_toks: 12, do_sample: false}
        metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
        """,
}


def write_tasks(folder: Path, docs: list[dict[str, Any]] | None = None) -> Path:
    """A folder with the three tasks and their documents."""
    data = folder / "docs.jsonl"
    data.write_text("".join(f"{json.dumps(doc)}\n" for doc in docs or DOCS))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / f"{name}.yaml").write_text(head + dedent(text).lstrip())
    return folder


def evaluate(model: Any, folder: Path, *tasks: str, **settings: Any) -> dict[str, Any]:
    """The results of lm-eval, its samples included."""
    found: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        **{"verbosity": "ERROR", **settings},
    )
    return found
