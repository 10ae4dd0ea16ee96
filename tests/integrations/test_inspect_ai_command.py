"""``inspect eval`` in a process of its own, which finds the provider by its entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from inspect_ai.log import read_eval_log

import asyncmodels
from tests.server.handle import Server
from tests.server.script import Answer

ROOT = Path(asyncmodels.__file__).parents[1]
TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

@task
def greeting(count: int = 5):
    questions = [Sample(input=f"Question {number}", target="Hello") for number in range(count)]
    return Task(dataset=questions, solver=generate(), scorer=includes())
"""
MISSING = """
import sys
sys.modules["inspect_ai"] = None  # as if it were not installed
import asyncmodels
try:
    import asyncmodels.integrations.inspect_ai
except asyncmodels.MissingExtraError as error:
    print(error)
"""
LIGHT = """
import sys, inspect_ai.model
before = set(sys.modules)
import asyncmodels.integrations.inspect_ai
print(len([name for name in set(sys.modules) - before if not name.startswith("asyncmodels")]))
"""


@pytest.fixture
def environment(tmp_path: Path) -> Mapping[str, str]:
    """One in which a package is installed that has the entry point."""
    package = tmp_path / "site" / "asyncmodels_entry-0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: asyncmodels-entry\nVersion: 0\n")
    (package / "entry_points.txt").write_text("[inspect_ai]\nasyncmodels = asyncmodels.integrations.inspect_ai\n")
    (tmp_path / "greeting.py").write_text(TASK)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), str(ROOT)]), "COLUMNS": "200"}


def inspect(folder: Path, environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "inspect_ai", "eval", "greeting.py", "--log-dir", "logs", "--display", "plain"]
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=110, check=False
    )


@pytest.mark.timeout(240)
def test_the_command_line(server: Server, tmp_path: Path, environment: Mapping[str, str]) -> None:
    """A task file, a model by its name, arguments for its constructor and for inspect_ai make an evaluation."""
    place = server.script(Answer(delay=0.3))
    ended = inspect(
        tmp_path,
        {**environment, "OPENAI_API_KEY": "k-12345678"},
        *("--model", "asyncmodels/openai/test-model", "--model-base-url", f"{place.url}/v1"),
        *("-M", "max_concurrency=2", "--temperature", "0.5", "--max-tokens", "7"),
    )
    assert ended.returncode == 0, ended.stderr + ended.stdout
    [file] = (tmp_path / "logs").iterdir()
    log = read_eval_log(str(file))
    assert (log.status, log.eval.model, log.eval.model_args) == (
        "success",
        "asyncmodels/openai/test-model",
        {"max_concurrency": 2},
    )
    seen = place.seen()
    assert (len(seen.requests), seen.peak) == (5, 2)
    assert {(body["temperature"], body["max_tokens"]) for request in seen.requests if (body := request.json())} == {
        (0.5, 7)
    }


@pytest.mark.timeout(240)
def test_what_is_typed_wrong_on_the_command_line(tmp_path: Path, environment: Mapping[str, str]) -> None:
    """One sentence, and no traceback."""
    ended = inspect(tmp_path, environment, "--model", "asyncmodels/opnai/gpt-5")
    said = ended.stdout + ended.stderr
    assert "ERROR: Unknown scheme 'opnai': did you mean 'openai'?" in said
    assert "Traceback" not in said


def test_a_missing_package_says_what_to_install() -> None:
    """Importing the integration without inspect_ai names the command that mends it."""
    ended = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == (
        "The provider for inspect_ai needs the package 'inspect_ai': pip install \"asyncmodels[inspect]\"\n"
    )


def test_an_evaluation_of_other_models_does_not_pay_for_us() -> None:
    """inspect_ai imports every provider's entry point, and ours brings nothing in that is not there already."""
    ended = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "0\n"
