"""kill -9 at any instant of a run in mode "batch": no batch that was paid for is lost, and none is paid for twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.batch.bulk_killing import answered, let_end, run_and_kill, start
from tests.server.batches import Fault, Provider, running_provider


@pytest.fixture
def provider() -> Iterator[Provider]:
    with running_provider() as started:
        yield started


@pytest.mark.parametrize("suffix", ["sqlite", "jsonl"])
def test_killed_runs_pay_once(tmp_path: Path, provider: Provider, suffix: str) -> None:
    """Wherever the kills fall, each request is in one batch that was begun, and each item has its own answer."""
    provider.polls = 3
    found = run_and_kill(tmp_path, provider, kills=5, count=40, suffix=suffix)
    assert (found.paid_twice, found.lost, found.wrong) == ([], [], [])
    assert found.kills == 5


POINTS = {
    "while a file is sent": Fault("POST", "/files", hold=True),
    "when a file was sent, before anybody said so": Fault("POST", "/files", hold=True, acts=True),
    "while a batch is begun, before the provider heard of it": Fault("POST", "/batches", hold=True),
    "when a batch was begun, before anybody said so": Fault("POST", "/batches", hold=True, acts=True),
    "when one of two batches was begun, before anybody said so": Fault(
        "POST", "/batches", hold=True, acts=True, after=1
    ),
    "while it waits": Fault("GET", "/batches/", hold=True, acts=True),
    "while it fetches": Fault("GET", "/files/", hold=True, acts=True),
}


@pytest.mark.parametrize(
    ("point", "metadata"),
    [*((point, True) for point in POINTS), ("when a batch was begun, before anybody said so", False)],
)
def test_a_run_that_was_killed_goes_on(tmp_path: Path, provider: Provider, point: str, metadata: bool) -> None:
    """At each step: what was begun is found again, by the key that it carries or the file that it was made of, and what
    was not is begun; files of which no batch was made do not stay at the provider."""
    provider.stores_metadata = metadata
    fault = POINTS[point]
    count = 12 if fault.after else 8
    provider.faults.append(Fault(**vars(fault)))
    journal = tmp_path / "run.sqlite"
    child = start(provider, journal, count)
    provider.until(lambda seen: seen.held == 1)
    child.kill()
    let_end(child)

    rest = let_end(start(provider, journal, count))

    assert set(rest) == {f"q{number}" for number in range(count)}
    assert len(answered(journal)) == count
    assert set(provider.paid.values()) == {1}
    assert provider.paid.total() == count
    unused = provider.names.keys() & provider.files.keys() - {
        b.data["input_file_id"] for b in provider.batches.values()
    }
    # Nobody could know the id of a file before the provider said it.
    assert len(unused) == (point == "when a file was sent, before anybody said so")
