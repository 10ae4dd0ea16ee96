"""The example for inspect_ai, with a model that knows one capital."""

from __future__ import annotations

import gc
import runpy
import warnings
from pathlib import Path

import pytest

from asyncmodels.model import Model
from asyncmodels.testing import ScriptedBackend

EXAMPLE = Path(__file__).parents[2] / "examples" / "inspect_task.py"


def test_one_of_four_capitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task asks each question once and scores the answers."""
    monkeypatch.setenv("INSPECT_LOG_DIR", str(tmp_path))
    backend = ScriptedBackend(*["It is Paris."] * 4)
    with warnings.catch_warnings():
        # inspect_ai leaves streams of its own open at the end of each evaluation.
        warnings.filterwarnings("ignore", message="Unclosed <MemoryObject", category=ResourceWarning)
        evaluate = runpy.run_path(str(EXAMPLE))["evaluate"]
        assert evaluate(Model(backend)) == 0.25
        gc.collect()
    assert {request.max_tokens for request in backend.requests} == {12}
