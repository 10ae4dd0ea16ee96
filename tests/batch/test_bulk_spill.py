"""What lies on the disk while a batch is at work comes back as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncmodels import InvalidRequestError, Item, UnsupportedError
from asyncmodels.batch.bulk_spill import FileOfLines, Row, Spill, name_of
from asyncmodels.batch.item import Entry
from asyncmodels.request import build_request


@pytest.fixture
def spill(tmp_path: Path) -> Iterator[Spill]:
    made = Spill(tmp_path)
    yield made
    made.close()
    assert not tmp_path.exists()


def entry(index: int, **params: Any) -> Entry:
    return Entry(index, f"q{index}", build_request(f"prompt {index}", params, {}))


def test_requests_come_back_as_they_were(spill: Spill) -> None:
    """With formats, tools and values of functions and classes that nobody can import."""

    class Local:
        pass

    def tool(x: int) -> int:
        """Adds one."""
        return x + 1

    local = Local()
    given = [
        entry(0, max_tokens=3, extra={"a": [1, 2]}),
        entry(1, response_format=dict[str, int], tools=[tool]),
        entry(2, metadata={"kind": Local, "function": tool}),
        entry(3, metadata={"lock": local, "unpicklable": threading.Lock()}),
    ]
    spill.add(Row(1, each) for each in given)
    taken = [each.what for each in spill.of_part(1, 10)]
    assert taken[:3] == given[:3]
    [first, second, third, fourth] = [each.request for each in taken]
    assert first is not None
    assert second is not None
    assert third is not None
    assert fourth is not None
    assert second.response_format is given[1].request.response_format  # type: ignore[union-attr]  # there is one
    assert second.tools[0].function is tool
    assert third.metadata["kind"] is Local
    assert fourth.metadata["lock"] is local


def test_items_that_wait_come_back_with_their_errors(spill: Spill) -> None:
    """Kind, words and cause of an error stay, and the place decides the order."""
    error = InvalidRequestError("no good", code="c")
    error.__cause__ = UnsupportedError("inner")
    items = [Item(index=n, id=str(n), request=None, error=error) for n in (1, 0)]
    spill.add(Row(0, each) for each in items)
    taken = spill.in_order(0, 10, lambda part: True)
    assert [each.what.index for each in taken] == [0, 1]
    assert isinstance(taken[0].what, Item)
    assert repr(taken[0].what.error) == repr(error)
    assert getattr(taken[0].what.error, "code", None) == "c"


def test_order_has_no_gaps(spill: Spill) -> None:
    """What is taken in order begins with the place that is asked for, and ends before the first that is not ready."""
    spill.add([Row(1, entry(0)), Row(2, entry(1)), Row(1, entry(3))])
    assert [each.what.index for each in spill.in_order(0, 10, lambda part: part == 1)] == [0]
    assert [each.what.index for each in spill.in_order(0, 10, lambda part: True)] == [0, 1]
    assert spill.in_order(2, 10, lambda part: True) == []


def test_lines_are_found_by_name_and_part(spill: Spill) -> None:
    """The first line of a name counts; dropped rows take theirs along."""
    spill.add([Row(1, entry(0)), Row(2, entry(1))])
    file = spill.output()
    file.write(b"q0 one\nq0 two\n\nbroken\nq1 other\nq0")
    names = {b"q0": "q0", b"q1": "q1"}
    assert spill.index(1, file, lambda line: names.get(line[:2])) == 1
    [taken] = spill.of_part(1, 10)
    assert taken.line == b"q0 one\n"
    assert spill.of_part(2, 10)[0].line is None
    spill.drop([taken])
    assert spill.of_part(1, 10) == []
    spill.let_go(1)


def test_a_file_is_full_by_requests_or_bytes(tmp_path: Path) -> None:
    """Whichever comes first; only its owner can read it."""
    lines = FileOfLines(tmp_path / "x", max_requests=2, max_bytes=10)
    assert not lines.is_full(b"x" * 10)
    lines.add(b"12345\n")
    assert lines.is_full(b"12345")
    assert not lines.is_full(b"1234")
    lines.add(b"12\n")
    assert lines.is_full(b"")
    lines.close()
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600
    lines.delete()
    lines.delete()


def test_names_are_plain_and_their_own() -> None:
    """An id that is plain stays; any other becomes a digest, and so does one that looks like such a digest."""
    assert name_of("q-1_a.b:c") == "q-1_a.b:c"
    names = [name_of(id) for id in ("a b", "a  b", "id-1", "-a", "x" * 65, "ü", "")]
    assert len(set(names)) == len(names)
    assert all(name.startswith("id-") for name in names)
