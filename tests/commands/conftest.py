"""A provider that repeats what it is asked, as the model of every command, in a folder of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.handle import Place, Server
from tests.server.script import Answer

CHECKOUT = Path(__file__).parents[2]
Provided = Callable[..., Place]
Started = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def provided(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Provided:
    """Makes a provider of these answers that of every command."""

    def provide(*answers: Answer) -> Place:
        place = server.script(*answers or (Answer(echo=True),))
        monkeypatch.setenv("OPENAI_BASE_URL", f"{place.url}/v1")
        return place

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("ASYNCMODELS_MODEL", "openai:m")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH", "")])))
    return provide


@pytest.fixture
def place(provided: Provided) -> Place:
    """One that repeats what it is asked."""
    return provided()


@pytest.fixture
def started(provided: Provided) -> Started:
    """Starts a command in a process of its own."""

    def start(*arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "asyncmodels", *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    return start
