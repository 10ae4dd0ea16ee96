"""What tests of ``asyncmodels batch`` read and write: files of JSON lines, and what the provider was asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asyncmodels.cli import main
from tests.server.handle import Place


def lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def contents(path: str | Path) -> dict[str, str | None]:
    return {row["id"]: row["content"] for row in lines(path)}


def asked(place: Place) -> list[dict[str, Any]]:
    return [request.json() for request in place.seen().requests]


def failed(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["id"]: row["error_text"] for row in rows if "error" in row}


def wrote(path: str, *values: object) -> str:
    Path(path).write_text("".join(f"{json.dumps(value)}\n" for value in values), "utf-8")
    return path


def refused(capsys: pytest.CaptureFixture[str], place: Place, *arguments: str) -> str:
    """What is said, in one line, of a command that asks nothing."""
    before = len(place.seen().requests)
    assert main(["batch", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("asyncmodels batch: ")
    assert len(place.seen().requests) == before
    return err.removeprefix("asyncmodels batch: ").rstrip("\n")
