"""An example that runs inside of the test's process, where what it imports is imported already."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

__all__ = ["run_here"]

_EXAMPLES = Path(__file__).parents[2] / "examples"


def run_here(monkeypatch: pytest.MonkeyPatch, example: str, *arguments: str, **environment: str) -> None:
    """Runs it with these arguments and variables; what it raises comes out.

    Each example also runs in a Python of its own, as its reader would run it: that is for what it says when all is
    well, since the packages that some of them import take seconds.
    """
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = _EXAMPLES / example
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path), run_name="__main__")
