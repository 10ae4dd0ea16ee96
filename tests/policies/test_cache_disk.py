"""DiskStore: one file for many loops, threads and processes, never wrong, and nothing that was flushed is lost."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from asyncmodels.errors import ClosedError, ConfigurationError
from asyncmodels.policies.cache import Cache
from asyncmodels.policies.cache_file import CacheFile
from asyncmodels.policies.cache_store import StoreError
from asyncmodels.policies.cached_answer import Entry
from asyncmodels.policies.disk_store import DiskStore
from asyncmodels.testing import ScriptedBackend
from asyncmodels.types import Message, Request


def key(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


def entry(text: str = "x", at: float = 1.0) -> Entry:
    return Entry(text.encode(), b"{}", at)


def content_of(path: Path) -> bytes:
    return path.read_bytes()


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def damage(path: Path) -> None:
    """Writes noise over every third page but the first."""
    data = bytearray(path.read_bytes())
    for start in range(8192, len(data), 12288):
        data[start : start + 4096] = os.urandom(len(data[start : start + 4096]))
    path.write_bytes(data)


def ask(text: str = "Hi") -> Request:
    return Request(messages=(Message("user", text),), temperature=0)


def store_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("cache.db ")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.db"


# -- keeping ----------------------------------------------------------------------------------------------------------


async def test_what_was_put_is_found_at_once_and_by_the_next(path: Path) -> None:
    """An entry is there as soon as it was put, and still there for a store that opens the file later."""
    async with DiskStore(path) as store:
        assert await store.get(key(1)) is None
        await store.put(key(1), entry("one"))
        assert await store.get(key(1)) == entry("one")
        await store.flush()
        assert store.statistics().written == 1
        assert await store.get(key(1)) == entry("one")
        await store.put(key(1), entry("new"))
        assert await store.get(key(1)) == entry("new")
    async with DiskStore(path) as store:
        assert await store.get(key(1)) == entry("new")
        await store.delete(key(1))
        assert await store.get(key(1)) is None
        await store.flush()
        assert await store.get(key(1)) is None


async def test_nothing_is_opened_before_it_is_needed(path: Path) -> None:
    """Making a store and closing it touches no file and starts no thread."""
    store = DiskStore(path)
    await store.flush()
    await store.aclose()

    assert not path.exists()  # noqa: ASYNC240  # a look at a folder of the test's own


async def test_the_latest_come_first(path: Path) -> None:
    """``recent`` sees what is not written yet, too, latest first."""
    async with DiskStore(path) as store:
        for number in range(5):
            await store.put(key(number), entry(str(number)))
            await store.flush()

        assert [each.answer for _, each in await store.recent(2)] == [b"4", b"3"]


async def test_what_was_used_longest_ago_makes_room(path: Path) -> None:
    """Above ``max_bytes`` the entries that were used last stay."""
    big = Entry(b"x" * 10_000, b"", 0.0)
    async with DiskStore(path, max_bytes=100_000) as store:
        for number in range(600):
            await store.put(key(number), big)
            if number % 50 == 0:
                await store.flush()
        await store.flush()
        left = await store.recent(1000)
        assert store.statistics().evicted > 200
    file = CacheFile(path)
    try:
        assert file.evict(100_000) >= 0
        assert file.size() <= 100_000
    finally:
        file.close()
    assert max(int.from_bytes(found[:4], "big") for found, _ in left) == 599


def test_a_use_is_noted_once_an_hour(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read again and again is not written each time; what was not read for an hour is, and then stays."""
    now = 1e9
    monkeypatch.setattr(time, "time", lambda: now)
    file = CacheFile(path)
    try:
        file.write({key(1): entry(), key(2): entry()})
        now += 3000
        assert [due for _, due in file.get([key(1), key(2)]).values()] == [False, False]
        now += 3000
        assert file.get([key(1)])[key(1)] == (entry(), True)
        file.write({}, [key(1)])
        assert file.get([key(1)])[key(1)] == (entry(), False)
        assert file.evict(file.size() - 1) == 1
        assert set(file.get([key(1), key(2)])) == {key(1)}
    finally:
        file.close()


async def test_a_hit_notes_the_use(path: Path) -> None:
    """A store notes by itself what was not used for long, so that evicting knows."""
    async with DiskStore(path) as store:
        await store.put(key(1), entry())
        await store.flush()
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE answers SET used_at = 5")
        connection.close()
        assert await store.get(key(1)) == entry()
        await store.put(key(2), entry())  # any write takes the note along
        await store.flush()
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT MIN(used_at) FROM answers").fetchone()[0] > 5
    connection.close()


# -- files that are not what they should be ---------------------------------------------------------------------------


async def test_a_file_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    """A database that is not ours is a ConfigurationError at the first call, and not changed."""
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    before = content_of(path)

    cache = Cache(ScriptedBackend("x"), store=path)
    with pytest.raises(ConfigurationError, match="another program"):
        await cache.generate(ask())
    await cache.aclose()

    assert content_of(path) == before


@pytest.mark.parametrize("content", [b"not a database at all " * 50, b"SQLite format 3\x00" + b"\xff" * 5000])
async def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    """Text, or a damaged head, is a ConfigurationError, and not changed."""
    write(path, content)

    async with DiskStore(path) as store:
        with pytest.raises(ConfigurationError, match="no cache"):
            await store.get(key(1))

    assert content_of(path) == content


async def test_a_folder_is_refused(tmp_path: Path) -> None:
    """A path that is no file is a ConfigurationError that names it."""
    async with DiskStore(tmp_path) as store:
        with pytest.raises(ConfigurationError, match="cannot be opened"):
            await store.get(key(1))


async def test_a_file_of_a_later_version_is_refused(path: Path) -> None:
    """What this version cannot read it does not guess at."""
    async with DiskStore(path) as store:
        await store.put(key(1), entry())
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()

    async with DiskStore(path) as store:
        with pytest.raises(ConfigurationError, match="later version"):
            await store.get(key(1))


async def test_a_file_of_an_earlier_version_starts_empty(path: Path) -> None:
    """Answers in an old format are dropped, and the file is used as a new one."""
    async with DiskStore(path) as store:
        await store.put(key(1), entry())
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 0")
    connection.close()

    async with DiskStore(path) as store:
        assert await store.get(key(1)) is None
        await store.put(key(1), entry("new"))
    async with DiskStore(path) as store:
        assert await store.get(key(1)) == entry("new")


async def test_a_damaged_row_is_a_miss(path: Path) -> None:
    """A row whose bytes have changed, or that stands under another's key, is not an answer."""
    async with DiskStore(path) as store:
        for number in (1, 2, 3):
            await store.put(key(number), entry(str(number)))
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE answers SET packed = CAST(packed || 'x' AS BLOB) WHERE key = ?", (key(1),))
        packed = connection.execute("SELECT packed FROM answers WHERE key = ?", (key(3),)).fetchone()
        connection.execute("UPDATE answers SET packed = ? WHERE key = ?", (*packed, key(2)))
    connection.close()

    async with DiskStore(path) as store:
        assert [await store.get(key(number)) for number in (1, 2, 3)] == [None, None, entry("3")]
        assert [found for found, _ in await store.recent(5)] == [key(3)]


async def test_damage_in_the_middle_never_gives_a_wrong_answer(path: Path) -> None:
    """Pages of noise inside of the file lead to misses or clear errors, through a Cache to calls, and nothing else."""
    backend = ScriptedBackend(lambda request: f"to {request.messages[0].text}", repeat=True)
    async with Cache_of(backend, path) as cache:
        for number in range(200):
            await cache.generate(ask(str(number)))
    damage(path)

    async with Cache_of(backend, path) as cache:
        for number in range(200):
            assert str(await cache.generate(ask(str(number)))) == f"to {number}"
        assert cache.statistics().misses > 0


class Cache_of:  # noqa: N801  # reads as a phrase
    """A Cache over a file, closed at the end."""

    def __init__(self, backend: ScriptedBackend, path: Path) -> None:
        self.cache = Cache(backend, store=path)

    async def __aenter__(self) -> Cache:
        return self.cache

    async def __aexit__(self, *_: object) -> None:
        await self.cache._store.aclose()


# -- failing to write -------------------------------------------------------------------------------------------------


async def test_answers_that_cannot_be_written_are_counted_and_fail_nobody(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While another process holds the file for longer than ``patience``, answers are lost, and the log tells how
    many."""
    async with DiskStore(path, patience=0.05) as store:
        await store.get(key(1))
        await store.put(key(0), entry())
        await store.flush()
        blocker = sqlite3.connect(path, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        try:
            with caplog.at_level(logging.WARNING):
                await store.put(key(1), entry())
                with pytest.raises(StoreError, match="locked"):
                    await store.flush()
            assert await store.get(key(0)) == entry(), "readers do not wait for a writer"
            assert await store.get(key(1)) is None
        finally:
            blocker.execute("ROLLBACK")
            blocker.close()
        counted = store.statistics()
        assert (counted.failed, counted.pending) == (1, 0)
        assert "1 answers were not kept" in caplog.text
        await store.put(key(1), entry("later"))
        await store.flush()
        assert await store.get(key(1)) == entry("later")


async def test_much_that_is_pending_waits_for_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever puts faster than the disk writes is held back once too many bytes are pending."""
    monkeypatch.setattr("asyncmodels.policies.threaded_store._MOST_PENDING", 100_000)
    big = Entry(b"x" * 60_000, b"", 0.0)
    async with DiskStore(path) as store:
        for number in range(50):
            await store.put(key(number), big)
            assert store._pending.bytes <= 100_000
        await store.flush()
        assert store._pending.bytes == 0
        assert store.statistics().written == 50


# -- closing ----------------------------------------------------------------------------------------------------------


async def test_closing_writes_what_is_pending_and_ends_the_threads(path: Path) -> None:
    """After ``aclose`` everything is in the file, no thread is left, and what comes later is a ClosedError."""
    store = DiskStore(path)
    for number in range(100):
        await store.put(key(number), entry(str(number)))
    await store.get(key(1000))
    assert store_threads() == {"cache.db reader", "cache.db writer"}

    workers = [store._reader, store._writer]
    await store.aclose()
    await store.aclose()

    for worker in workers:
        assert worker is not None
        worker.join()
    with pytest.raises(ClosedError):
        await store.get(key(1))
    with pytest.raises(ClosedError):
        await store.put(key(1), entry())
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT COUNT(*) FROM answers").fetchone() == (100,)
    connection.close()
    assert "closed" in repr(store)


async def test_a_job_for_a_thread_that_ends_is_refused(path: Path) -> None:
    """Whoever got hold of the reader just before it was stopped is told so, and does not wait for ever."""
    from asyncmodels.policies.store_worker import Job

    store = DiskStore(path)
    reader = store._read()
    await store.aclose()
    reader.join()

    with pytest.raises(ClosedError):
        await reader.ask(Job(key=key(1)))


async def test_cancelled_readers_leave_nothing(path: Path) -> None:
    """A thousand readers that go away in the middle disturb neither the next ones nor the thread."""
    async with DiskStore(path) as store:
        await store.put(key(1), entry())
        await store.flush()
        for turns in range(3):
            tasks = [asyncio.create_task(store.get(key(1))) for _ in range(333)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) or result == entry() for result in results)
        assert await store.get(key(1)) == entry()


def test_a_store_that_nobody_has_any_more_ends_its_threads(path: Path) -> None:
    """Without ``aclose``, too, the threads end when the store is gone, and what was put is written."""

    async def use() -> list[Any]:
        store = DiskStore(path)
        await store.get(key(1))
        await store.put(key(1), entry())
        return [store._reader, store._writer]

    workers = asyncio.run(use())
    gc.collect()
    for worker in workers:
        worker.join(10)
        assert not worker._thread.is_alive()
    file = CacheFile(path)
    assert file.get([key(1)])[key(1)][0] == entry()
    file.close()


# -- many at a time ---------------------------------------------------------------------------------------------------


def test_one_store_serves_many_loops_and_threads(path: Path) -> None:
    """Loops in several threads, one after the other and at a time, share a store."""
    store = DiskStore(path)
    failures: list[BaseException] = []

    async def work(seed: int) -> None:
        for number in range(60):
            await store.put(key(number), entry(str(number)))
            found = await asyncio.gather(*(store.get(key(each)) for each in range(number + 1)))
            assert all(one is None or one == entry(str(each)) for each, one in enumerate(found))

    def thread(seed: int) -> None:
        try:
            asyncio.run(work(seed))
            asyncio.run(work(seed))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=thread, args=(seed,)) for seed in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert failures == []

    async def end() -> None:
        assert [await store.get(key(number)) for number in range(60)] == [entry(str(number)) for number in range(60)]
        await store.aclose()

    asyncio.run(end())


def test_many_may_make_a_file_at_a_time(tmp_path: Path) -> None:
    """Threads that open a file that is not there yet, all at once, never take it for another program's."""
    failures: list[BaseException] = []

    def make(path: Path, start: threading.Barrier) -> None:
        start.wait()
        try:
            CacheFile(path).close()
        except BaseException as error:
            failures.append(error)

    for number in range(15):
        start = threading.Barrier(6)
        threads = [threading.Thread(target=make, args=(tmp_path / f"{number}.db", start)) for _ in range(6)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert failures == []


WRITER = """
import asyncio, sys
from asyncmodels.policies.cached_answer import Entry
from asyncmodels.policies.disk_store import DiskStore

async def main(path, seed):
    async with DiskStore(path) as store:
        for number in range(200):
            key = number.to_bytes(4, "big") * 8
            found = await store.get(key)
            assert found is None or found.answer == b"answer %d" % number, found
            await store.put(key, Entry(b"answer %d" % number, b"{}", 1.0))
            if number % 20 == seed:
                await store.flush()
        counted = store.statistics()
        assert counted.failed == 0, counted

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


async def test_processes_share_a_file(path: Path) -> None:
    """Four processes that make, fill and read one file at a time agree on every answer and lose none."""
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, str(path), str(seed), stderr=asyncio.subprocess.PIPE
        )
        for seed in range(4)
    ]
    for process in processes:
        _, said = await process.communicate()
        assert process.returncode == 0, said.decode()

    async with DiskStore(path) as store:
        for number in range(200):
            found = await store.get(key(number))
            assert found is not None
            assert found.answer == b"answer %d" % number


def run(script: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path)], capture_output=True, text=True, timeout=60
    )


def test_the_end_of_the_program_writes_what_is_pending(path: Path) -> None:
    """A program that never closes its store loses nothing when it ends."""
    ended = run(
        """
        import asyncio, sys
        from asyncmodels.policies.cached_answer import Entry
        from asyncmodels.policies.disk_store import DiskStore
        store = DiskStore(sys.argv[1])
        async def main():
            for number in range(500):
                await store.put(number.to_bytes(4, "big") * 8, Entry(b"x" * 1000, b"{}", 1.0))
        asyncio.run(main())
        """,
        path,
    )
    assert ended.returncode == 0, ended.stderr
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT COUNT(*) FROM answers").fetchone() == (500,)
    connection.close()


def test_a_killed_process_leaves_a_good_file(path: Path) -> None:
    """A process that is killed in the middle of writing leaves a file that opens, and only whole entries."""
    killed = run(
        """
        import asyncio, os, signal, sys, threading
        from asyncmodels.policies.cached_answer import Entry
        from asyncmodels.policies.disk_store import DiskStore
        async def main():
            store = DiskStore(sys.argv[1])
            for number in range(100000):
                await store.put(number.to_bytes(4, "big") * 8, Entry(b"x" * 1000, b"{}", 1.0))
                if store.statistics().written > 300:
                    os.kill(os.getpid(), signal.SIGKILL)
                await asyncio.sleep(0)
        asyncio.run(main())
        """,
        path,
    )
    assert killed.returncode < 0, killed.stderr
    file = CacheFile(path)
    try:
        found = file.get(key(number) for number in range(100))
        assert len(found) == 100
        assert {each.answer for each, _ in found.values()} == {b"x" * 1000}
    finally:
        file.close()


FORK = """
import asyncio, os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from asyncmodels.errors import ConfigurationError
from asyncmodels.policies.cached_answer import Entry
from asyncmodels.policies.disk_store import DiskStore
path = sys.argv[1]
store = DiskStore(path)
one, two = b"1" * 32, b"2" * 32
async def before():
    await store.put(one, Entry(b"parent", b"{}", 1.0))
    await store.flush()
    assert await store.get(one)
    if CLOSES:
        await store.aclose()
asyncio.run(before())
child = os.fork()
async def refused(store):
    try:
        await store.get(one)
    except ConfigurationError as error:
        assert "forked" in str(error), error
        await store.aclose()
        return True
async def used(store):
    assert (await store.get(one)).answer == b"parent"
    await store.put(two, Entry(b"child", b"{}", 1.0))
    await store.aclose()
async def after():
    if child:
        await store.aclose()
    elif CLOSES:
        await used(DiskStore(path))
    else:
        assert await refused(store) and await refused(DiskStore(path))
asyncio.run(after())
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("closes", [True, False])
def test_a_file_does_not_survive_a_fork_open(path: Path, closes: bool) -> None:
    """In a forked process a file that was open is an error, at once and in words, since SQLite would lose answers; one
    that was closed before is used as ever."""
    ended = run(FORK.replace("CLOSES", str(closes)), path)
    assert ended.returncode == 0, ended.stderr
    file = CacheFile(path)
    try:
        found = {each.answer for each, _ in file.get([b"1" * 32, b"2" * 32]).values()}
        assert found == ({b"parent", b"child"} if closes else {b"parent"})
    finally:
        file.close()


# -- settings ---------------------------------------------------------------------------------------------------------


def test_bad_settings_are_refused() -> None:
    """No path and no size are ConfigurationErrors."""
    with pytest.raises(ConfigurationError, match="path"):
        DiskStore("")
    with pytest.raises(ConfigurationError, match="max_bytes"):
        DiskStore("x.db", max_bytes=0)


def test_the_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A path may begin with ~."""
    monkeypatch.setenv("HOME", str(tmp_path))

    assert DiskStore("~/x.db").path == tmp_path / "x.db"


async def test_a_file_that_never_opens_holds_nothing_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is put into a store that cannot be opened is given up and logged, and closing it does not wait."""
    async with DiskStore(tmp_path) as store:
        for number in range(5):
            await store.put(key(number), entry())
            with pytest.raises(ConfigurationError):
                await store.flush()
        counted = store.statistics()
        assert (counted.failed, counted.pending, store._pending.bytes) == (5, 0, 0)
    assert "were not kept" in caplog.text


async def test_what_waits_outlives_a_failure_to_make_room(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When evicting fails, what is written is written, and what came meanwhile is written next."""

    def fail(file: CacheFile, max_bytes: int) -> int:
        raise sqlite3.OperationalError("disk I/O error")

    async with DiskStore(path) as store:
        await store.put(key(0), entry())
        await store.flush()
        with monkeypatch.context() as patched:
            patched.setattr(CacheFile, "evict", fail)
            for number in range(1, 600):
                await store.put(key(number), entry(str(number)))
            await asyncio.gather(store.flush(), return_exceptions=True)
        await store.flush()
        assert (store.statistics().failed, store.statistics().written) == (0, 600)
