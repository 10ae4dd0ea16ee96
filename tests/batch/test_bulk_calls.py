"""The calls to a batch API: retried like others, patient with a provider that stumbles, and never beginning twice."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from asyncmodels import (
    AsyncModelsError,
    AuthenticationError,
    BatchError,
    BatchMode,
    ConnectError,
    ConnectionLostError,
    InvalidRequestError,
    InvalidResponseError,
    NotFoundError,
    RateLimitError,
    Request,
    Retry,
    ServerError,
)
from asyncmodels.batch.bulk_calls import TAG, BulkCalls
from asyncmodels.bulk import Bulk, BulkFile, Outcome, ProviderBatch
from asyncmodels.testing import FakeClock, ScriptedBackend

WORKING = ProviderBatch(id="b1", state="working", status="in_progress")
DONE = ProviderBatch(id="b1", state="completed", status="completed")


class ScriptedBulk(Bulk):
    """Does and raises what ``script`` says for each method, in turn; notes what it was asked for and when."""

    max_requests = 10
    max_bytes = 1000

    def __init__(self, clock: FakeClock, **script: list[Any]) -> None:
        self.clock = clock
        self.script = script
        self.seen: list[tuple[str, float]] = []
        self.begun: list[ProviderBatch] = []
        self.keys: list[str] = []

    def _next(self, name: str) -> Any:
        self.seen.append((name, self.clock.time()))
        value = self.script[name].pop(0)
        if isinstance(value, Exception):
            raise value
        return value

    def times(self, name: str) -> list[float]:
        return [at for each, at in self.seen if each == name]

    def line(self, name: str, request: Request, /) -> bytes:
        raise NotImplementedError

    def read(self, line: bytes, /) -> Outcome:
        raise NotImplementedError

    async def upload(self, path: Path, name: str, /, *, key: str) -> BulkFile:
        return self._next("upload")  # type: ignore[no-any-return]  # of the script

    async def file(self, id: str, /) -> BulkFile:
        return self._next("file")  # type: ignore[no-any-return]  # of the script

    async def discard(self, id: str, /) -> None:
        self._next("discard")

    async def create(self, file: str, /, *, key: str, tags: Mapping[str, str]) -> ProviderBatch:
        self.keys.append(key)
        said = self._next("create")
        if isinstance(said, tuple):  # it is begun, and something else comes back
            self.begun.append(ProviderBatch(id="b1", state="working", status="validating", tags=tags, input_file=file))
            raise said[0]
        return said  # type: ignore[no-any-return]  # of the script

    async def find(self, wanted: Callable[[ProviderBatch], str | None], count: int, /) -> Mapping[str, ProviderBatch]:
        self.seen.append(("find", self.clock.time()))
        if self.script.get("find"):
            raise self.script["find"].pop(0)
        return {name: batch for batch in self.begun if (name := wanted(batch)) is not None}

    async def poll(self, id: str, /) -> ProviderBatch:
        return self._next("poll")  # type: ignore[no-any-return]  # of the script

    async def fetch(self, file: str, to: BinaryIO, /) -> None:
        to.write(b"half")
        to.write(self._next("fetch"))

    async def cancel(self, id: str, /) -> ProviderBatch:
        return self._next("cancel")  # type: ignore[no-any-return]  # of the script


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(autojump=True)


def calls(bulk: ScriptedBulk, *, retry: bool = True, **settings: Any) -> BulkCalls:
    mode = BatchMode(clock=bulk.clock, random=lambda: 0.5, **settings)
    return BulkCalls(bulk, mode, Retry(ScriptedBackend(), attempts=4) if retry else None)


# -- beginning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ConnectionLostError("lost"), ServerError("500", status=500), InvalidResponseError("?")]
)
@pytest.mark.parametrize("retry", [True, False])
async def test_a_batch_that_was_begun_in_silence_is_found(
    clock: FakeClock, error: AsyncModelsError, retry: bool
) -> None:
    """Where the provider may have heard it, nobody asks again before the list was looked at, a while later; also where
    calls are not retried."""
    bulk = ScriptedBulk(clock, create=[(error,)])
    async with clock:
        batch = await calls(bulk, retry=retry, settle=7).create("file-1", "key")
    assert batch.id == "b1"
    assert [name for name, _ in bulk.seen] == ["create", "find"]
    assert bulk.times("find")[0] >= 7


async def test_a_batch_that_was_not_begun_is_begun(clock: FakeClock) -> None:
    """Where the list does not have it, it is asked for again, with the same key, as often as calls are retried."""
    bulk = ScriptedBulk(clock, create=[ServerError("500"), ServerError("500"), DONE])
    async with clock:
        assert await calls(bulk).create("file-1", "key") is DONE
    assert [name for name, _ in bulk.seen] == ["create", "find", "create", "find", "create"]
    assert set(bulk.keys) == {"key"}


@pytest.mark.parametrize("error", [ConnectError("refused"), RateLimitError("slow down", status=429, retry_after=30)])
async def test_what_nobody_heard_needs_no_looking(clock: FakeClock, error: AsyncModelsError) -> None:
    """A request that never arrived, or was sent away, is made again after the wait that was asked for."""
    bulk = ScriptedBulk(clock, create=[error, DONE])
    async with clock:
        await calls(bulk).create("file-1", "key")
    assert [name for name, _ in bulk.seen] == ["create", "create"]
    assert bulk.times("create")[1] >= (error.retry_after or 0)


async def test_a_refusal_is_not_asked_twice(clock: FakeClock) -> None:
    """A 400 comes out at once."""
    bulk = ScriptedBulk(clock, create=[InvalidRequestError("no", status=400)])
    async with clock:
        with pytest.raises(InvalidRequestError):
            await calls(bulk).create("file-1", "key")
    assert len(bulk.seen) == 1


async def test_a_provider_without_a_list(clock: FakeClock) -> None:
    """Nobody can say whether it was begun: that is an error with a way out, and with ``on_unknown="ask"`` a second
    batch."""
    bulk = ScriptedBulk(clock, create=[ServerError("500"), DONE], find=[NotFoundError("404"), NotFoundError("404")])
    async with clock:
        with pytest.raises(BatchError, match=r"Nobody can say whether a batch was begun.*on_unknown") as caught:
            await calls(bulk).create("file-1", "key")
        assert caught.value.state == "unknown"
        assert await calls(bulk, on_unknown="ask").create("file-1", "key") is DONE


async def test_all_attempts_that_fail_come_out(clock: FakeClock) -> None:
    """In the end the error is the provider's, after a last look at the list."""
    bulk = ScriptedBulk(clock, create=[ServerError(f"number {n}") for n in range(4)])
    async with clock:
        with pytest.raises(ServerError, match="number 3"):
            await calls(bulk).create("file-1", "key")
    assert [name for name, _ in bulk.seen][-1] == "find"


@pytest.mark.parametrize("lost", [True, False])
async def test_a_file_that_is_used_again_finds_no_older_batch(clock: FakeClock, lost: bool) -> None:
    """A batch with another key of ours is another batch, though it was made of the same file; only one whose metadata
    the provider did not keep is known by its file."""
    bulk = ScriptedBulk(clock, create=[ServerError("500"), DONE] if lost else [])
    bulk.begun = [replace(WORKING, id="b0", state="failed", tags={TAG: "older"}, input_file="file-1")]
    async with clock:
        if lost:
            assert await calls(bulk).create("file-1", "key") is DONE
        assert await calls(bulk).find({"key": "file-1"}) == {}
        assert {*await calls(bulk).find({"older": "file-1"})} == {"older"}
        bulk.begun = [replace(WORKING, tags={"mine": "x"}, input_file="file-1")]
        assert {*await calls(bulk).find({"key": "file-1"})} == {"key"}


# -- waiting ----------------------------------------------------------------------------------------------------------


async def test_a_batch_is_looked_at_ever_more_rarely(clock: FakeClock) -> None:
    """From ``poll`` to ``poll_max``, and everybody is told what was seen."""
    bulk = ScriptedBulk(clock, poll=[WORKING] * 8 + [DONE])
    seen: list[ProviderBatch] = []
    async with clock:
        assert await calls(bulk, poll=4, poll_max=20).until_ended("b1", seen.append) is DONE
    times = [0.0, *bulk.times("poll")]
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert waits[0] == 4
    assert waits == sorted(waits)
    assert waits[-1] == 20
    assert len(seen) == 9


async def test_a_batch_of_an_earlier_run_is_looked_at_at_once(clock: FakeClock) -> None:
    """It may have ended hours ago."""
    bulk = ScriptedBulk(clock, poll=[DONE])
    async with clock:
        await calls(bulk).until_ended("b1", lambda _: None, at_once=True)
    assert bulk.times("poll") == [0.0]


async def test_a_provider_that_stumbles_is_waited_for(clock: FakeClock) -> None:
    """Errors that may pass do not end the wait, far beyond what calls are retried for."""
    bulk = ScriptedBulk(clock, poll=[ServerError("down")] * 30 + [DONE])
    async with clock:
        assert await calls(bulk).until_ended("b1", lambda _: None) is DONE


async def test_patience_has_an_end(clock: FakeClock) -> None:
    """A provider that cannot be asked for ``patience`` seconds ends the wait with its error."""
    bulk = ScriptedBulk(clock, poll=[ServerError("down")] * 10_000)
    async with clock:
        with pytest.raises(ServerError):
            await calls(bulk, patience=600).until_ended("b1", lambda _: None)
    assert 600 < clock.time() < 900


async def test_what_does_not_pass_is_not_waited_for(clock: FakeClock) -> None:
    """A wrong key ends it at once."""
    bulk = ScriptedBulk(clock, poll=[AuthenticationError("401", status=401)])
    async with clock:
        with pytest.raises(AuthenticationError):
            await calls(bulk).until_ended("b1", lambda _: None)


async def test_a_batch_that_nobody_knows_yet(clock: FakeClock) -> None:
    """A 404 may come a moment after the beginning; the fourth in a row is the end."""
    bulk = ScriptedBulk(clock, poll=[NotFoundError("404")] * 3 + [WORKING] + [NotFoundError("404")] * 3 + [DONE])
    async with clock:
        assert await calls(bulk).until_ended("b1", lambda _: None) is DONE
        bulk.script["poll"] = [NotFoundError("404")] * 4
        with pytest.raises(BatchError, match="does not know the batch 'b1'") as caught:
            await calls(bulk).until_ended("b1", lambda _: None)
    assert (caught.value.state, caught.value.batch) == ("missing", "b1")


async def test_a_status_that_nobody_knows_has_an_end(clock: FakeClock) -> None:
    """Once nothing has changed about such a batch for ``patience`` seconds it is a BatchError that names the word."""
    odd = replace(WORKING, status="rejected", known=False)
    bulk = ScriptedBulk(clock, poll=[WORKING] * 30 + [odd] * 5 + [replace(odd, completed=1)] * 1000)
    async with clock:
        with pytest.raises(BatchError, match=r"'b1'.*'rejected'") as caught:
            await calls(bulk, patience=600, poll=60).until_ended("b1", lambda _: None)
    assert (caught.value.state, caught.value.batch) == ("unknown", "b1")
    assert clock.time() - bulk.times("poll")[35] == pytest.approx(660)


# -- files ------------------------------------------------------------------------------------------------------------


async def test_a_file_is_waited_for_until_it_is_ready(clock: FakeClock) -> None:
    """Azure looks at a file first."""
    pending, ready = BulkFile(id="f", ready=False), BulkFile(id="f")
    bulk = ScriptedBulk(clock, upload=[ServerError("500"), pending], file=[pending, ready])
    async with clock:
        assert await calls(bulk).upload(Path("x"), "key") == "f"
    assert len(bulk.times("file")) == 2


async def test_half_an_output_is_fetched_again_as_a_whole(clock: FakeClock) -> None:
    """Each attempt writes to a file of its own, and those that failed are closed."""
    bulk = ScriptedBulk(clock, fetch=[ConnectionLostError("cut"), b" and half"])
    made: list[io.BytesIO] = []

    async def begin() -> BinaryIO:
        made.append(io.BytesIO())
        return made[-1]

    async with clock:
        output = await calls(bulk).fetch("f", begin)
    output.seek(0)
    assert output.read() == b"half and half"
    assert [file.closed for file in made] == [True, False]


async def test_a_file_that_cannot_be_deleted_is_no_error(clock: FakeClock) -> None:
    """It only stays at the provider."""
    bulk = ScriptedBulk(clock, discard=[NotFoundError("404")])
    async with clock:
        await calls(bulk).discard("f")
    assert bulk.times("discard")


# -- retries ----------------------------------------------------------------------------------------------------------


async def test_calls_are_retried_as_the_model_says(clock: FakeClock) -> None:
    """The settings of the model's own Retry hold; without one, a call is one attempt."""
    bulk = ScriptedBulk(clock, cancel=[ServerError("500")] * 20)
    async with clock:
        with pytest.raises(ServerError) as caught:
            await calls(bulk).cancel("b1")
        assert caught.value.attempts == 4
        with pytest.raises(ServerError):
            await calls(bulk, retry=False).cancel("b1")
        assert len(bulk.seen) == 5
        only = partial(Retry, attempts=2, on=(KeyError,))(ScriptedBackend())
        with pytest.raises(ServerError):
            await BulkCalls(bulk, BatchMode(clock=clock), only).cancel("b1")
    assert len(bulk.seen) == 6


@pytest.fixture(autouse=True)
def _nothing_is_left(clock: FakeClock) -> Iterator[None]:
    yield
    assert clock.sleeping == 0
