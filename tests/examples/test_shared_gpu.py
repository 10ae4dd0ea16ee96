"""The example of fifty agents on one engine, run as its reader would, on a tiny model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "shared_gpu.py"


@pytest.mark.model
def test_it_shows_its_figures(tmp_path: Path) -> None:
    """All agents are answered, and the last picture has the engine's figures and a line for each priority."""
    from tests.local.on_torch.tiny_llama import build_tiny_model

    folder = build_tiny_model(tmp_path / "model")
    command = [sys.executable, str(EXAMPLE), "--model", str(folder), "--agents", "9", "--turns", "1", "--tokens", "5"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1].startswith("9 answers for 9 agents")
    assert re.search(r"batch +0 of 16 rows +queued +0", ended.stdout)
    assert re.search(r"in all +\d+", ended.stdout)
    for kind in ("interactive", "normal", "background"):
        assert re.search(rf"{kind} +. 3 ", ended.stdout)


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (["--agents", "0"], "argument --agents: at least 1, not 0", 2),
        (["--tokens", "many"], "argument --tokens: invalid count value: 'many'", 2),
        (["--model", "/nowhere"], "There is no folder '/nowhere'.", 1),
    ],
)
def test_what_is_typed_wrong_is_said_in_one_sentence(arguments: list[str], says: str, code: int) -> None:
    """No traceback: the last line says what to mend."""
    ended = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments], capture_output=True, text=True, timeout=100, check=False
    )
    assert (ended.returncode, "Traceback" in ended.stderr) == (code, False)
    assert ended.stderr.splitlines()[-1].endswith(says)
