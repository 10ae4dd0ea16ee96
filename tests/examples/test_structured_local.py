"""The example for structured answers, run as its reader would, on a tiny model that knows nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "structured_local.py"


@pytest.mark.model
def test_every_answer_has_its_form(tmp_path: Path) -> None:
    """Even a random model fills in the dataclass, chooses a word, writes a number, and makes a call that runs."""
    from tests.local.on_torch.tiny_llama import build_tiny_model

    folder = build_tiny_model(tmp_path / "model", max_position_embeddings=2048)
    ended = subprocess.run(
        [sys.executable, str(EXAMPLE), f"transformers:{folder}"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # for crumbs of work one thread is many times faster
    )
    assert ended.returncode == 0, ended.stderr
    letter, mood, order, call = ended.stdout.splitlines()
    assert re.fullmatch(r"Letter\(subject='.+', kind='(question|order|complaint)', urgent=(True|False)\)", letter)
    assert re.fullmatch("mood: (happy|neutral|angry)", mood)
    assert re.fullmatch("order: [A-Z]-[0-9]{1,3}", order)
    assert re.fullmatch(r"refund\(\{.*\}\) -> Order .+ is paid back, because it was (late|broken|wrong)\.", call)
