"""Journals on disks that are full or cannot be written to, and files that are damaged, cut, or something else."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from asyncmodels.batch.journal_lock import JournalLock
from asyncmodels.batch.reading import read_journal
from asyncmodels.batch.record import Record
from asyncmodels.batch.salvage import Salvaged, salvage_journal
from asyncmodels.errors import JournalError, ServerError
from asyncmodels.model import Model
from asyncmodels.testing import ScriptedBackend
from asyncmodels.types import Request, Response

COUNT = 400


@pytest.fixture(params=["sqlite", "jsonl"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"run.{request.param}"


class Oracle:
    def __init__(self, size: int = 400) -> None:
        self.size = size
        self.asked: list[str] = []
        self.model = Model(ScriptedBackend(self.answer, repeat=True, model="m"))

    def answer(self, request: Request) -> Response:
        text = request.messages[-1].text
        self.asked.append(text)
        return Response(content=f"<{text}>" * (self.size // len(text)), finish_reason="stop")


def inputs(count: int = COUNT) -> list[dict[str, str]]:
    return [{"id": f"item {number}", "prompt": f"prompt {number}"} for number in range(count)]


async def ask(path: Path, count: int = COUNT, oracle: Oracle | None = None) -> list[str]:
    oracle = oracle or Oracle()
    items = await oracle.model.map(inputs(count), journal=path, progress=False).results()
    assert all(item.ok for item in items)
    return oracle.asked


def records(path: Path) -> dict[str, Record]:
    with read_journal(path) as journal:
        return {record.id: record for record in journal.records()}


# -- files that are not what they should be ---------------------------------------------------------------------------


async def test_a_journal_cut_in_the_middle_of_a_page(tmp_path: Path) -> None:
    """It is said in one sentence, with what to do; and salvaging gives back all that is left."""
    path, mended = tmp_path / "run.sqlite", tmp_path / "mended.sqlite"
    await ask(path)
    size = path.stat().st_size  # a look at a file of the test's own
    os.truncate(path, size // 2 + 1000)
    with pytest.raises(JournalError, match=r"is damaged \(.*\): salvage_journal"):
        await ask(path)
    assert path.stat().st_size == size // 2 + 1000  # the same
    saved = salvage_journal(path, mended)
    assert 0.3 * COUNT < saved.items == saved.answered < 0.7 * COUNT
    assert len(await ask(mended)) == COUNT - saved.items
    assert len(records(mended)) == COUNT


@pytest.mark.parametrize(("page", "begin"), [(0, b""), (0, b"{"), (1, b""), (2, b""), (5, b""), (30, b"")])
async def test_noise_in_a_page(tmp_path: Path, page: int, begin: bytes) -> None:
    """Whichever page it is, no wrong answer comes out, and what the other pages hold can be saved, also where the noise
    begins as the other format does."""
    path, mended = tmp_path / "run.sqlite", tmp_path / "mended.jsonl"
    await ask(path)
    whole = {id: record.answer for id, record in records(path).items()}
    data = bytearray(path.read_bytes())  # the same
    data[page * 4096 : page * 4096 + 4096] = begin + os.urandom(4096 - len(begin))
    path.write_bytes(data)  # the same
    with pytest.raises(JournalError, match=r"damaged.*salvage_journal|is no journal, or one that was damaged"):
        await ask(path)
    saved = salvage_journal(path, mended)
    assert saved.answered > 0.8 * COUNT
    assert all(record.answer == whole[id] for id, record in records(mended).items() if record.key is not None)
    await ask(mended)
    assert {id: record.answer for id, record in records(mended).items()} == whole


async def test_a_line_that_was_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The half line at the end is taken off and said; its item is asked again."""
    path = tmp_path / "run.jsonl"
    await ask(path, 10)
    lines = path.read_bytes().splitlines(keepends=True)  # the same
    kept = [line for line in lines if b'"id"' in line or b'"who"' in line]
    path.write_bytes(b"".join(kept)[:-20])  # the same
    with caplog.at_level(logging.WARNING, "asyncmodels"):
        assert len(await ask(path, 10)) == 1
    assert "ended in the middle of a line" in caplog.text
    assert len(records(path)) == 10


async def test_a_line_that_is_none(tmp_path: Path) -> None:
    """One in the middle is damage: its number is named, and the others can be saved."""
    path, mended = tmp_path / "run.jsonl", tmp_path / "mended.sqlite"
    await ask(path, 10)
    lines = path.read_bytes().splitlines(keepends=True)  # the same
    lines[3] = b'{"id": "item 1", "answ\x00\xff\n'
    path.write_bytes(b"".join(lines))  # the same
    with pytest.raises(JournalError, match="line 4 is none of ours"):
        await ask(path, 10)
    with pytest.raises(JournalError, match="line 4 is none of ours"):
        records(path)
    assert salvage_journal(path, mended).answered == 9
    assert len(await ask(mended, 10)) == 1


@pytest.mark.parametrize("begin", [b"", b"{", b'{"asyncmodels":"journal","form'])
async def test_a_file_of_a_run_that_was_killed_at_once(tmp_path: Path, begin: bytes) -> None:
    """What a kill leaves of the first line is a new journal."""
    path = tmp_path / "run.jsonl"
    path.write_bytes(begin)  # the same
    assert len(await ask(path, 3)) == 3
    assert len(records(path)) == 3


@pytest.mark.parametrize("content", [b"my notes\n", b'{"id": 1}\n', b"x" * 5000, b"SQLite format 3\0" + b"x" * 5000])
async def test_files_of_others(path: Path, content: bytes) -> None:
    """They are refused, and not touched."""
    path.write_bytes(content)  # noqa: ASYNC240  # the same
    with pytest.raises(JournalError, match=r"no journal|damaged"):
        await ask(path)
    assert path.read_bytes() == content  # noqa: ASYNC240  # the same
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name]  # the same


async def test_the_database_of_another_program(tmp_path: Path) -> None:
    """It is refused, and not touched."""
    path = tmp_path / "run.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    for work in (lambda: read_journal(path), lambda: salvage_journal(path, tmp_path / "to.sqlite")):
        with pytest.raises(JournalError, match="no journal"):
            work()
    with pytest.raises(JournalError, match="no journal"):
        await ask(path)


async def test_a_later_version(path: Path) -> None:
    """A file of a later version is left to it."""
    await ask(path, 2)
    if path.suffix == ".sqlite":
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 99")
        connection.close()
    else:
        path.write_bytes(path.read_bytes().replace(b'"format":1', b'"format":99', 1))  # noqa: ASYNC240  # the same
    with pytest.raises(JournalError, match="later version"):
        await ask(path, 2)
    with pytest.raises(JournalError, match="later version"):
        read_journal(path)


@pytest.mark.parametrize("suffix", ["sqlite", "jsonl"])
async def test_what_is_salvaged_is_counted_by_items(path: Path, tmp_path: Path, suffix: str) -> None:
    """However often an item was tried, it is one: answered, or failed, as its latest attempt was; or of no use, where
    it is not known what was asked."""

    async def run(**replies: Response | Exception) -> None:
        model = Model(ScriptedBackend(lambda request: replies[request.messages[-1].text], repeat=True, model="m"))
        await model.map(list(replies), journal=path, progress=False).results()

    bad, good = ServerError("broken", status=500), Response(content="yes", finish_reason="stop")
    await run(a=bad, b=bad, c=bad)
    await run(a=bad, b=good, c=bad)
    saved = salvage_journal(path, tmp_path / f"first.{suffix}")
    assert saved == Salvaged(items=3, answered=1, failed=2)
    await run(a=bad, b=good, c=good)
    if path.suffix == ".jsonl":
        path.write_bytes(path.read_bytes().replace(b'"content":"b"', b'"content":"x"'))  # noqa: ASYNC240  # a test's own
    else:
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE items SET question = replace(question, '\"b\"', '\"x\"')")
    saved = salvage_journal(path, tmp_path / f"second.{suffix}")
    assert saved == Salvaged(items=3, answered=1, failed=1)


async def test_salvaging_what_cannot_be(path: Path, tmp_path: Path) -> None:
    """Onto a file that exists, from one that does not, or of nothing: one sentence each."""
    with pytest.raises(JournalError, match="no such file"):
        salvage_journal(path, tmp_path / "to.sqlite")
    await ask(path, 2)
    with pytest.raises(JournalError, match="exists"):
        salvage_journal(path, path)
    assert salvage_journal(path, tmp_path / "to.jsonl") == Salvaged(items=2, answered=2, failed=0)
    path.write_bytes(path.read_bytes()[:60])  # noqa: ASYNC240  # the same
    with pytest.raises(JournalError, match=r"Nothing can be read|no journal"):
        salvage_journal(path, tmp_path / "other.jsonl")
    assert not (tmp_path / "other.jsonl").exists()


@pytest.mark.parametrize("suffix", ["sqlite", "jsonl"])
async def test_salvaging_onto_what_a_run_has_just_made(
    path: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal that was not there when it was looked for, and is when its lock is free, is left alone."""
    await ask(path, 2)
    target = tmp_path / f"to.{suffix}"

    class Late(JournalLock):
        def __init__(self, journal: Path) -> None:
            if journal == target:
                target.write_bytes(b"of a run")
            super().__init__(journal)

    monkeypatch.setattr("asyncmodels.batch.salvage.JournalLock", Late)
    with pytest.raises(JournalError, match="exists"):
        salvage_journal(path, target)
    assert target.read_bytes() == b"of a run"
    assert {each.name for each in tmp_path.iterdir()} == {path.name, target.name}  # noqa: ASYNC240  # a test's own


# -- disks that will not take it --------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can make a small disk")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("suffix", ["sqlite", "jsonl"])
async def test_a_full_disk(small: Path, suffix: str) -> None:
    """Whatever was answered comes out, then one clear sentence; what was written is still good once there is room."""
    path, oracle = small / f"run.{suffix}", Oracle(size=2000)
    came: list[str] = []

    async def read() -> None:
        async for item in oracle.model.map(inputs(), journal=path, progress=False, concurrency=20):
            came.append(item.id)  # noqa: PERF401  # some come before it raises

    with pytest.raises(JournalError, match="cannot be written: the disk is full"):
        await read()
    assert len(came) == len(set(came)) == len(oracle.asked) < COUNT
    kept = records(path)
    assert 0 < len(kept) < len(came)
    subprocess.run(["mount", "-o", "remount,size=4m", small], check=True)  # noqa: ASYNC221  # nothing else runs here
    assert len(await ask(path, oracle=Oracle(size=2000))) == COUNT - len(kept)
    assert len(records(path)) == COUNT


async def test_a_folder_that_cannot_be_written_to(small: Path, path: Path) -> None:
    """One sentence, before anything is asked; and a journal there can still be read."""
    place = small / path.name
    await ask(place, 3)
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)  # noqa: ASYNC221  # nothing else runs here
    oracle = Oracle()
    for name in (place, small / f"new{path.suffix}"):
        with pytest.raises(JournalError, match=r"cannot be opened: .*[Rr]ead-only"):
            await ask(name, oracle=oracle)
    assert oracle.asked == []
    assert len(records(place)) == 3


_LIMITED = textwrap.dedent(
    """
    import asyncio, resource, sys
    from pathlib import Path
    from tests.batch.test_journal_faults import Oracle, inputs

    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    async def main():
        oracle = Oracle(size=2000)
        came = 0
        try:
            async for item in oracle.model.map(inputs(), journal=sys.argv[1], progress=False, concurrency=20):
                came += 1
        except Exception as error:
            print(type(error).__name__, came == len(oracle.asked), error)

    asyncio.run(main())
    """
)


def test_a_file_that_may_not_grow(path: Path) -> None:
    """Another reason why nothing can be written, without a small disk: the same, and the file is whole."""
    ended = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert ended.stdout.startswith("JournalError True The journal"), ended.stderr
    assert "cannot be written" in ended.stdout
    assert 0 < len(records(path)) < COUNT


def test_no_such_place(path: Path, tmp_path: Path) -> None:
    """Folders on the way are made; a file in the way is said."""
    model = Oracle().model
    deep = tmp_path / "a" / "b" / path.name
    assert model.sync.map(["x"], journal=deep).results()[0].ok
    assert len(records(deep)) == 1
    (tmp_path / "file").write_text("x")
    with pytest.raises(JournalError, match="cannot be opened"):
        model.sync.map(["x"], journal=tmp_path / "file" / path.name).results()
    folder = tmp_path / f"folder{path.suffix}"
    folder.mkdir()
    with pytest.raises(JournalError, match="cannot be opened"):
        model.sync.map(["x"], journal=folder).results()
    with pytest.raises(JournalError, match="cannot be read: No such file"):
        read_journal(tmp_path / f"none{path.suffix}")


def test_a_journal_by_two_names(path: Path) -> None:
    """A link to a journal is the same journal, which one process at a time writes to."""
    link = path.with_name(f"link{path.suffix}")
    link.symlink_to(path.name)
    lock = JournalLock(link)
    assert path.with_name(f"{path.name}-lock").exists()
    assert not link.with_name(f"{link.name}-lock").exists()
    with pytest.raises(JournalError, match="in use"):
        JournalLock(path)
    lock.release()
    assert not path.with_name(f"{path.name}-lock").exists()
