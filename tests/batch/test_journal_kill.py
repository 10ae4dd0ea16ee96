"""kill -9 at any instant: nothing that came out is lost, and nothing that is there is paid for again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.batch.killing import run_and_kill


@pytest.mark.parametrize("suffix", ["sqlite", "jsonl"])
def test_killed_runs_go_on_from_where_they_were(tmp_path: Path, suffix: str) -> None:
    """Each item that came out is in the journal, none that is there is asked again, each has its own answer in the end,
    and no more were lost at a kill than were under way."""
    found = run_and_kill(tmp_path, kills=6, count=150, suffix=suffix)
    assert (found.asked_again, found.lost, found.wrong) == ([], [], [])
    assert found.kills == 6
    assert found.requests == 150 * found.runs + found.in_flight
    assert found.most_in_flight <= 2 * 10
