"""Runs over many inputs: what goes in, what comes out, and that neither memory nor calls are left behind."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from asyncmodels.batch.item import Item
from asyncmodels.errors import ConfigurationError, InvalidRequestError, RunStoppedError, ServerError
from asyncmodels.model import Model
from asyncmodels.testing import ScriptedBackend
from asyncmodels.types import Message, Request, Response


class Echo:
    """Answers with the last message; counts who is inside, lets tests hold answers back, and fails where told."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.asked: list[str] = []
        self.hold: set[str] = set()
        self.fail: set[str] = set()
        self.release = asyncio.Event()
        self.model = Model(ScriptedBackend(self.answer, repeat=True))

    async def answer(self, request: Request) -> Response:
        text = request.messages[-1].text
        self.asked.append(text)
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await asyncio.sleep(0)
            if text in self.hold:
                await self.release.wait()
            if text in self.fail:
                raise ServerError(f"no answer for {text}", status=500)
            return Response(content=text, finish_reason="stop")
        finally:
            self.inside -= 1


async def test_every_input_has_one_item() -> None:
    """Each input comes out once, with its own answer, under its place or its id."""
    echo = Echo()
    items = await echo.model.map(["a", {"id": "x", "prompt": "b"}, {"id": 7, "messages": "c"}, "d"]).results()
    assert [(item.index, item.id, str(item.unwrap())) for item in items] == [
        (0, "0", "a"),
        (1, "x", "b"),
        (2, "7", "c"),
        (3, "3", "d"),
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("hello", "hello"),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "u"),
        ({"role": "user", "content": "u"}, "u"),
        (Message("user", "m"), "m"),
        (Request(messages=(Message("user", "r"),)), "r"),
        ({"id": "1", "messages": [{"role": "user", "content": "d"}]}, "d"),
    ],
)
async def test_inputs_come_in_many_shapes(value: Any, text: str) -> None:
    """Whatever generate takes can be an input, and a dict of messages and parameters as well."""
    (item,) = await Echo().model.map([value]).results()
    assert str(item.unwrap()) == text


async def test_parameters_of_an_input_beat_those_of_the_run() -> None:
    """map's parameters are for the inputs that have none of their own; a Request's fields are its own, too."""
    echo = Echo()
    run = echo.model.map(["a", {"prompt": "b", "max_tokens": 5}], max_tokens=9, temperature=0)
    items = await run.results()
    assert [(item.request.max_tokens, item.request.temperature) for item in items if item.request] == [(9, 0), (5, 0)]


async def _ticks(count: int) -> AsyncIterator[str]:
    for number in range(count):
        await asyncio.sleep(0)
        yield str(number)


@pytest.mark.parametrize("inputs", [[str(n) for n in range(50)], iter([str(n) for n in range(50)]), _ticks(50)])
async def test_lists_iterators_and_async_iterators(inputs: Any) -> None:
    """The three kinds of input give the same items."""
    items = await Echo().model.map(inputs, concurrency=7).results()
    assert [str(item.unwrap()) for item in items] == [str(n) for n in range(50)]


async def test_items_come_as_they_complete() -> None:
    """An item that is slow holds nobody up."""
    echo = Echo()
    echo.hold = {"0"}
    seen = []
    async for item in echo.model.map([str(n) for n in range(5)]):
        seen.append(item.id)
        if len(seen) == 4:
            echo.release.set()
    assert seen[-1] == "0"
    assert sorted(seen) == ["0", "1", "2", "3", "4"]


async def test_ordered_items_come_in_the_order_of_the_input() -> None:
    """With ordered a slow item is waited for, and those behind it are worked off meanwhile."""
    echo = Echo()
    echo.hold = {"0"}
    asyncio.get_running_loop().call_later(0.02, echo.release.set)
    seen = [item.id async for item in echo.model.map([str(n) for n in range(50)], ordered=True, concurrency=5)]
    assert seen == [str(n) for n in range(50)]


async def test_no_more_calls_in_flight_than_asked_for() -> None:
    """concurrency bounds the calls in flight, and as many are used."""
    echo = Echo()
    await echo.model.map([str(n) for n in range(100)], concurrency=7).results()
    assert echo.most == 7


async def test_few_inputs_make_few_tasks() -> None:
    """Workers are hired as inputs come, not all at once."""
    echo = Echo()
    echo.hold = {"a", "b"}
    run = echo.model.map(["a", "b"], concurrency=1000)
    before = len(asyncio.all_tasks())
    reading = asyncio.create_task(run.results())
    await asyncio.sleep(0.01)
    assert len(asyncio.all_tasks()) - before <= 4
    echo.release.set()
    assert len(await reading) == 2


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_reader_who_stops_stops_the_calls(ordered: bool) -> None:
    """Nobody reads: a bounded number of inputs is taken up, whatever there is."""
    echo = Echo()
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield str(taken)

    run = echo.model.map(endless(), concurrency=5, ordered=ordered)
    items = aiter(run)
    await anext(items)
    for _ in range(20_000):
        await asyncio.sleep(0)
    first = taken
    assert first <= 2 * 5 + 2 + (4096 if ordered else 0)
    await anext(items)
    await asyncio.sleep(0.01)
    assert taken <= first + 1
    await run.aclose()


async def test_an_input_that_is_none_is_an_error_of_its_item() -> None:
    """What cannot be read names its place and id, is no call, and the rest goes on."""
    echo = Echo()
    run = echo.model.map(["a", {"id": "x", "prompt": 3}, {"id": "y"}, {"prompt": "b", "max_token": 3}, "z"])
    items = await run.results()
    assert [item.ok for item in items] == [True, False, False, False, True]
    assert "Input 1 (id 'x')" in str(items[1].error)
    assert '"messages" or a "prompt"' in str(items[2].error)
    assert "max_tokens" in str(items[3].error)
    assert echo.asked == ["a", "z"]
    assert run.statistics().errors == {"InvalidRequestError": 3}


async def test_ids_that_are_there_twice() -> None:
    """The second input with an id is an error, because results could not be told apart."""
    items = await Echo().model.map([{"id": "x", "prompt": "a"}, {"id": "x", "prompt": "b"}]).results()
    assert [item.ok for item in items] == [True, False]
    assert isinstance(items[1].error, InvalidRequestError)


async def test_errors_are_values() -> None:
    """An item that fails is one with an error, and the run goes on; unwrap raises it."""
    echo = Echo()
    echo.fail = {"1"}
    items = await echo.model.map(["0", "1", "2"]).results()
    assert [item.ok for item in items] == [True, False, True]
    with pytest.raises(ServerError, match="no answer for 1"):
        items[1].unwrap()


async def test_the_first_error_ends_the_run_where_asked() -> None:
    """on_error="raise" raises it, after the item itself came out, and cancels the rest."""
    echo = Echo()
    echo.fail, echo.hold = {"1"}, {"2"}
    with pytest.raises(ServerError, match="no answer for 1"):
        await echo.model.map(["0", "1", "2"], on_error="raise").results()
    assert echo.inside == 0


async def test_too_many_errors_end_the_run() -> None:
    """max_errors are let pass, and one more is the end, with the last as the cause."""
    echo = Echo()
    echo.fail = {str(n) for n in range(100)}
    run = echo.model.map([str(n) for n in range(100)], concurrency=1, max_errors=3)
    with pytest.raises(RunStoppedError, match="after 4 errors") as caught:
        await run.results()
    assert isinstance(caught.value.__cause__, ServerError)
    assert len(echo.asked) < 10


async def test_what_the_input_raises_comes_after_what_was_answered() -> None:
    """An iterator that breaks ends the run with its own error, and no answer before it is lost."""

    def broken() -> Iterator[str]:
        yield "a"
        yield "b"
        raise OSError("the disk is gone")

    seen: list[str] = []

    async def read() -> None:
        async for item in Echo().model.map(broken()):
            seen.append(item.id)  # noqa: PERF401  # some are seen before it raises

    with pytest.raises(OSError, match="the disk is gone"):
        await read()
    assert sorted(seen) == ["0", "1"]


async def _clean(echo: Echo) -> None:
    gc.collect()
    for _ in range(20):
        await asyncio.sleep(0)
    assert echo.inside == 0
    assert echo.model.statistics().running == 0
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize("way", ["break", "with", "aclose", "cancel", "task"])
async def test_leaving_a_run_cancels_what_is_in_flight(way: str) -> None:
    """However a run is left, no call and no task stays behind."""
    echo = Echo()
    echo.hold = {str(n) for n in range(1, 1000)}
    run = echo.model.map([str(n) for n in range(1000)], concurrency=20)
    if way == "break":
        async for _ in run:
            break
    elif way == "with":
        async with run:
            async for _ in run:
                break
    elif way == "aclose":
        items = aiter(run)
        await anext(items)
        await run.aclose()
        await run.aclose()
    elif way == "cancel":
        asyncio.get_running_loop().call_later(0.01, run.cancel)
        assert [item.id for item in await run.results()] == ["0"]
    else:
        task = asyncio.create_task(run.results())
        while echo.inside < 20:  # noqa: ASYNC110  # as many steps as it takes
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await _clean(echo)


async def test_a_run_is_gone_through_once() -> None:
    """Going through it again is an error instead of nothing."""
    run = Echo().model.map(["a"])
    await run.results()
    with pytest.raises(ConfigurationError, match="once"):
        await run.results()


async def test_limit_reads_no_further() -> None:
    """With a limit the input is not read beyond it."""
    taken: list[int] = []

    def numbers() -> Iterator[str]:
        for number in range(1000):
            taken.append(number)
            yield str(number)

    items = await Echo().model.map(numbers(), limit=10).results()
    assert (len(items), len(taken)) == (10, 10)
    assert await Echo().model.map(["a"], limit=0).results() == []


async def test_shuffle_is_decided_by_its_seed() -> None:
    """One seed gives one order, another another; every input is asked once, and keeps its place."""

    async def order(seed: int | None) -> list[str]:
        echo = Echo()
        items = await echo.model.map([str(n) for n in range(100)], shuffle=seed, concurrency=1).results()
        assert [str(item.unwrap()) for item in items] == [str(n) for n in range(100)]
        return echo.asked

    plain, first, again, other = await order(None), await order(1), await order(1), await order(2)
    assert first == again
    assert len({tuple(plain), tuple(first), tuple(other)}) == 3
    assert sorted(first) == sorted(plain)


async def test_the_longest_first() -> None:
    """schedule="longest" asks the longest prompts first."""
    echo = Echo()
    await echo.model.map(["aa", "a", "aaaa", "aaa"], schedule="longest", concurrency=1).results()
    assert echo.asked == ["aaaa", "aaa", "aa", "a"]


async def test_what_begins_alike_goes_together() -> None:
    """schedule="prefix" asks prompts with one system prompt one after the other, the longest first."""
    echo = Echo()
    asked = [("s1", "a"), ("s2", "b"), ("s1", "cc"), ("s2", "dd")]
    inputs = [[{"role": "system", "content": s}, {"role": "user", "content": u}] for s, u in asked]
    await echo.model.map(inputs, schedule="prefix", concurrency=1).results()
    assert echo.asked == ["cc", "a", "dd", "b"]


async def test_ordered_results_of_another_order_of_asking() -> None:
    """The order of asking and that of the results are two things."""
    echo = Echo()
    texts = ["a" * (1 + n * 7 % 50) for n in range(5000)]
    run = echo.model.map(texts, schedule="longest", ordered=True, concurrency=3)
    assert [str(item.unwrap()) async for item in run] == texts


async def test_statistics_of_a_run() -> None:
    """They count what was done, and say how much there is where the input says so."""
    echo = Echo()
    echo.fail = {"1"}
    run = echo.model.map(["0", "1", "2"])
    assert run.statistics().total == 3
    await run.results()
    now = run.statistics()
    assert (now.read, now.done, now.succeeded, now.failed, now.in_flight) == (3, 3, 2, 1, 0)
    assert now.errors == {"ServerError": 1}
    assert now.p50 is not None
    assert now.p95 is not None
    assert 0 < now.p50 <= now.p95
    assert now.elapsed > 0
    assert now.per_second > 0
    assert "3 of 3 done" in repr(run)
    assert Echo().model.map(iter("abc")).statistics().total is None


@pytest.mark.parametrize("inputs", ["one prompt", {"prompt": "x"}, b"bytes", Message("user", "m"), 3, None])
def test_one_input_is_not_many(inputs: Any) -> None:
    """A single prompt, which can be gone through letter by letter, is refused."""
    with pytest.raises(ConfigurationError, match="map takes"):
        Model(ScriptedBackend("a")).map(inputs)


@pytest.mark.parametrize(
    "settings",
    [
        {"concurrency": 0},
        {"concurrency": "auto"},
        {"limit": -1},
        {"shuffle": "x"},
        {"schedule": "random"},
        {"on_error": "ignore"},
        {"max_errors": True},
        {"shuffle": 1, "schedule": "longest"},
        {"shuffle": 1, "ordered": True},
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    """Each is refused when the run is made."""
    with pytest.raises(ConfigurationError):
        Model(ScriptedBackend("a")).map(["a"], **settings)


def test_without_a_loop() -> None:
    """model.sync.map gives the same items to callers without an event loop."""
    model = Model(ScriptedBackend(lambda request: request.messages[-1].text, repeat=True))
    run = model.sync.map((str(n) for n in range(1000)), concurrency=50)
    items: list[Item] = run.results()
    assert [str(item.unwrap()) for item in items] == [str(n) for n in range(1000)]
    assert run.statistics().succeeded == 1000


def test_leaving_a_run_without_a_loop() -> None:
    """Leaving it early cancels what is in flight, by with or by close."""
    model = Model(ScriptedBackend(lambda request: request.messages[-1].text, repeat=True))
    with model.sync.map((str(n) for n in range(100_000)), concurrency=5) as run:
        next(run)
    assert model.statistics().running == 0
    assert run.statistics().read < 1000


async def test_a_table_of_results_that_were_read() -> None:
    """Whoever has paid for a run may look at its results and make a table of them, too."""
    pytest.importorskip("pandas")
    run = Echo().model.map(["a", "b"], progress=False)
    assert [item.id for item in await run.results()] == list((await run.to_pandas()).index)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"max_token": 5}, "did you mean 'max_tokens'"),
        ({"concurency": 5}, "did you mean 'concurrency'"),
        ({"jurnal": "run.sqlite"}, "did you mean 'journal'"),
        ({"temperature": "hot"}, "temperature"),
        ({"params": {"max_tokens": 5}}, "Unknown parameter 'params': what only"),
        ({"retrun": 1}, "Unknown parameter 'retrun': what only"),
    ],
)
async def test_wrong_parameters_are_refused_at_once(params: dict[str, Any], says: str) -> None:
    """What is wrong in the call itself is no error of its items, one by one; what is wrong in an input is."""
    with pytest.raises(InvalidRequestError, match=says):
        Echo().model.map(["a"], **params)
    (bad, good) = await Echo().model.map([{"prompt": "a", **params}, "b"]).results()
    assert isinstance(bad.error, InvalidRequestError)
    assert str(good.unwrap()) == "b"


async def test_tools_that_can_be_gone_through_once_are_for_all_items() -> None:
    """An iterator of tools is read once, for the run and not for its first item."""

    def look(place: str) -> str:
        """Looks around.

        Args:
            place: where
        """
        return place

    backend = ScriptedBackend("yes", repeat=True)
    tools: Any = iter([look])
    await Model(backend).map(["a", "b"], tools=tools).results()
    assert [[tool.name for tool in request.tools] for request in backend.requests] == [["look"], ["look"]]
