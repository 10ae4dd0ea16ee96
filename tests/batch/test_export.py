"""Journals as files for other programs, and runs as tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from asyncmodels.batch.export import COLUMNS, export_journal
from asyncmodels.errors import ConfigurationError, JournalError, MissingExtraError, ServerError
from asyncmodels.model import Model
from asyncmodels.testing import ScriptedBackend
from asyncmodels.types import Request, Response, ToolCall, Usage


def answer(request: Request) -> Response:
    text = request.messages[-1].text
    if text == "bad":
        raise ServerError("broken", status=500)
    calls = (ToolCall("1", "look", '{"at": 1}'),) if text == "call" else ()
    return Response(content=f"<{text}>", finish_reason="stop", usage=Usage(1, 2), tool_calls=calls)


MODEL = Model(ScriptedBackend(answer, repeat=True))
INPUTS = [{"id": "a", "prompt": "one"}, {"id": "b", "prompt": "bad"}, {"id": "c", "prompt": "call"}, {"id": "d"}]


@pytest.fixture(params=["sqlite", "jsonl"])
async def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"run.{request.param}"
    await MODEL.map(INPUTS, journal=path, max_tokens=7).results()
    return path


def test_to_jsonl(journal: Path, tmp_path: Path) -> None:
    """A line for each item, with the request and the calls as what they are."""
    to = tmp_path / "out.jsonl"
    assert export_journal(journal, to) == 4
    rows = {row["id"]: row for row in map(json.loads, to.read_text().splitlines())}
    assert rows["a"]["messages"] == [{"role": "user", "content": "one"}]
    assert (rows["a"]["question"]["max_tokens"], rows["a"]["content"], rows["a"]["output_tokens"]) == (7, "<one>", 2)
    assert (rows["b"]["error"], rows["b"]["error_text"], rows["b"]["error_status"]) == ("ServerError", "broken", 500)
    assert rows["c"]["tool_calls"] == [{"id": "1", "name": "look", "arguments": '{"at": 1}'}]
    assert rows["d"]["error"] == "InvalidRequestError"


def test_to_parquet(journal: Path, tmp_path: Path) -> None:
    """A row for each item, with a type for each column."""
    from pyarrow import parquet

    to = tmp_path / "out.parquet"
    assert export_journal(journal, to) == 4
    table = parquet.read_table(to)
    assert table.column_names == [name for name, _ in COLUMNS]
    rows = {row["id"]: row for row in table.to_pylist()}
    assert (rows["a"]["content"], rows["a"]["place"], rows["b"]["error_status"]) == ("<one>", 0, 500)
    assert json.loads(rows["a"]["messages"]) == [{"role": "user", "content": "one"}]
    assert str(table.schema.field("output_tokens").type) == "int64"


def test_files_that_are_there(journal: Path, tmp_path: Path) -> None:
    """One that exists is kept, unless told otherwise; nothing half is left behind."""
    to = tmp_path / "out.jsonl"
    to.write_text("mine")
    with pytest.raises(JournalError, match="exists"):
        export_journal(journal, to)
    assert to.read_text() == "mine"
    export_journal(journal, to, overwrite=True)
    assert len(to.read_text().splitlines()) == 4
    if journal.suffix == ".jsonl":
        with pytest.raises(JournalError, match="itself"):
            export_journal(journal, journal, overwrite=True)
    with pytest.raises(JournalError, match="cannot be written"):
        export_journal(journal, tmp_path / "none" / "out.jsonl")
    with pytest.raises(ConfigurationError, match="jsonl or"):
        export_journal(journal, tmp_path / "out.csv")
    assert {each.name for each in tmp_path.iterdir()} == {journal.name, "out.jsonl"}


def test_without_pyarrow(journal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install is said."""
    monkeypatch.delitem(sys.modules, "asyncmodels.batch.parquet", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"asyncmodels\[parquet\]"):
        export_journal(journal, tmp_path / "out.parquet")


async def test_to_pandas() -> None:
    """A row for each item in the order of the input, errors and what is missing among them."""
    frame = await MODEL.map(INPUTS).to_pandas()
    assert list(frame.index) == ["a", "b", "c", "d"]
    assert frame.loc["a", "content"] == "<one>"
    assert frame.loc["a", "output_tokens"] == 2
    assert str(frame["output_tokens"].dtype) == "Int64"
    assert frame.loc["b", "error"] == "ServerError"
    assert frame["error"].isna().tolist() == [True, False, True, False]
    assert list((await MODEL.map([]).to_pandas()).columns) == list(frame.columns)


def test_to_pandas_without_a_loop() -> None:
    """model.sync.map has it, too."""
    assert MODEL.sync.map(INPUTS).to_pandas().loc["c", "content"] == "<call>"


async def test_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install is said, before anything is asked."""
    monkeypatch.delitem(sys.modules, "asyncmodels.batch.frame", raising=False)
    monkeypatch.setitem(sys.modules, "pandas", None)
    backend = ScriptedBackend("x")
    with pytest.raises(MissingExtraError, match=r"asyncmodels\[pandas\]"):
        await Model(backend).map(["a"]).to_pandas()
    assert backend.requests == []
