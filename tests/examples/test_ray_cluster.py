"""The example of one run on many machines, run as its reader would, on a cluster that Ray starts for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.server.handle import Server

pytest.importorskip("ray", reason="Ray is not installed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_cluster.py"


@pytest.mark.cluster
def test_two_workers_answer(server: Server) -> None:
    """All items are answered, both workers are named with what they did, and a limit of each one's own is refused."""
    place = server.script()
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = {
            **os.environ,
            "OPENAI_BASE_URL": f"{place.url}/v1",
            "OPENAI_API_KEY": "sk-of-the-environment",
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [sys.executable, str(EXAMPLE), "--model", "openai:m", "--count", "12"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
        refused = subprocess.run(
            [*command, "--rpm", "60"], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    assert ended.returncode == 0, ended.stderr
    assert "item-11 Hello from the test server." in ended.stdout
    assert "12 answers, 0 errors" in ended.stdout
    assert len(re.findall(r"process \d+: [1-9]\d* answers", ended.stdout)) == 2
    assert {request.header("authorization") for request in place.seen().requests} == {"Bearer sk-of-the-environment"}
    assert refused.stderr.startswith("requests_per_minute would hold for each of the 2 workers by itself")
    assert len(refused.stderr.splitlines()) == 1
