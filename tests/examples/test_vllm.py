"""The example for vLLM, run as its reader would, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.local.on_vllm.kept import SETTINGS, prepare_environment, tiny_folder
from tests.local.on_vllm.marks import VLLM

EXAMPLE = Path(__file__).parents[2] / "examples" / "vllm_model.py"
pytestmark = list(VLLM)


def test_it_prints_moods_replies_and_figures() -> None:
    """Each review gets one of the three moods and a reply; in the end nothing runs any more."""
    prepare_environment()
    command = [sys.executable, str(EXAMPLE), str(tiny_folder()), json.dumps(dict(SETTINGS))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    moods = [line for line in lines if line[:8].strip() in ("good", "bad", "neutral")]
    assert len(moods) == 5
    assert "'num_running': 0" in lines[-1]
