"""The example for MLX, run as its reader would, on a tiny model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "mlx_model.py"


@pytest.mark.model
def test_it_prints_both_turns(tmp_path: Path) -> None:
    """Four questions with their answers, and the second turns, which find most of the first at hand."""
    from tests.local.on_mlx.tiny_mlx import build_tiny_model

    folder = build_tiny_model(tmp_path / "model", max_position_embeddings=2048)
    ended = subprocess.run(
        [sys.executable, str(EXAMPLE), str(folder)], capture_output=True, text=True, timeout=100, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    counts = [tuple(map(int, found)) for found in re.findall(r"\((\d+) tokens in, (\d+) of them", ended.stdout)]
    assert len(counts) == 8
    assert ended.stdout.startswith("Why is the sky blue? ")
    for first, second in zip(counts[::2], counts[1::2], strict=True):
        assert second[0] > first[0]
        assert second[1] >= first[0] - 2
