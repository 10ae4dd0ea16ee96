"""Several engines on one device: who is in place, who makes way, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from asyncmodels.clock import SystemClock
from asyncmodels.errors import AsyncModelsError, ClosedError, ConfigurationError, ModelLoadError
from asyncmodels.local.engine import Engine
from asyncmodels.local.host import EngineHost, HostedEngine
from asyncmodels.local.runner import Runner, RunnerInfo
from asyncmodels.local.turns import Turns
from asyncmodels.types import Request, Response, ResponseBuilder

Ask = Callable[..., Request]

GB = 10**9


class HandClock(SystemClock):
    """Shows what it was set to, on any thread."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now


async def answer(engine: Engine, request: Request) -> Response:
    handle = await engine.submit(request, streaming=True)
    builder = ResponseBuilder()
    try:
        async for delta in handle:
            builder.add(delta)
    finally:
        handle.cancel()
    return builder.response()


async def until(condition: Callable[[], bool]) -> None:
    for _ in iter(condition, True):
        await asyncio.sleep(0)


class Home:
    """Makes engines of scripted runners on one host, and keeps a diary of what uses the device."""

    def __init__(self, scripted: Any, host: EngineHost) -> None:
        self.scripted = scripted
        self.host = host
        self.clock: Any = host._device._clock
        self.diary: list[str] = []
        self.loaded: set[str] = set()
        self.most_loaded = 0
        self.most_bytes = 0
        self.sizes: dict[str, int] = {}
        self.gates: dict[str, threading.Event] = {}
        self.engines: list[Engine] = []
        self._using = 0
        self.at_once = 0

    def engine(self, name: str, size: int = 4 * GB, *, on: EngineHost | None = None, **settings: Any) -> Engine:
        home = self
        gate = self.gates.setdefault(name, threading.Event())
        gate.set()
        self.sizes[name] = size

        class Hosted(self.scripted):  # type: ignore[misc, name-defined]  # a class from a fixture
            def load(self) -> RunnerInfo:
                with home.using():
                    home.diary.append(f"load {name}")
                    info = super().load()
                    home.loaded.add(name)
                    home.most_bytes = max(home.most_bytes, sum(home.sizes[each] for each in home.loaded))
                object.__setattr__(info, "weight_bytes", size - (self.kv_memory or 0))
                assert isinstance(info, RunnerInfo)
                return info

            def step(self) -> Any:
                gate.wait(30)
                with home.using():
                    return super().step()

            def close(self) -> None:
                with home.using():
                    super().close()
                    home.loaded.discard(name)
                    home.diary.append(f"close {name}")

        engine = Engine(lambda: Hosted(), model_id=name, host=on or self.host, **settings)
        self.host._device.residents()[-1].size = size
        self.engines.append(engine)
        return engine

    def using(self) -> Any:
        home = self

        class Using:
            def __enter__(self) -> None:
                home._using += 1
                home.at_once = max(home.at_once, home._using)

            def __exit__(self, *_: object) -> None:
                home._using -= 1

        return Using()

    def of(self, name: str) -> HostedEngine:
        return next(engine for engine in self.host.statistics().engines if engine.model_id == name)


@pytest.fixture
async def make(scripted: Any) -> AsyncIterator[Callable[..., Home]]:
    homes: list[Home] = []

    def build(memory: float = 10 * GB, **settings: Any) -> Home:
        settings.setdefault("clock", HandClock())
        homes.append(Home(scripted, EngineHost(memory, **settings)))
        return homes[-1]

    yield build
    for home in homes:
        for gate in home.gates.values():
            gate.set()
        await home.host.aclose()
        # Nothing is left of anybody.
        assert home.loaded == set()
        assert home.host.statistics().used == 0
        assert home.host.statistics().engines == ()
        assert home.host._device._timer is None


async def test_what_fits_stays(make: Callable[..., Home], ask: Ask) -> None:
    """Two models that fit together are loaded once each, and answer at the same time."""
    home = make()
    one, two = home.engine("one"), home.engine("two")
    for _ in range(3):
        responses = await asyncio.gather(*(answer(engine, ask(max_tokens=4)) for engine in (one, two) * 5))
        assert {response.content for response in responses} == {"abcd"}
    assert sorted(home.diary) == ["load one", "load two"]
    assert home.host.statistics().used == 8 * GB
    assert [engine.loads for engine in home.host.statistics().engines] == [1, 1]


async def test_the_idle_one_that_was_used_longest_ago_makes_way(make: Callable[..., Home], ask: Ask) -> None:
    """A third model takes the place of the one that nobody has used for the longest time."""
    home = make(min_stay=0)
    one, two, three = (home.engine(name) for name in ("one", "two", "three"))
    for engine in (one, two, one, three):
        home.clock.now += 1
        await answer(engine, ask(max_tokens=1))
    assert home.diary == ["load one", "load two", "close two", "load three"]
    assert (home.of("one").resident, home.of("two").resident, home.of("three").resident) == (True, False, True)
    assert two.statistics().state == "idle"
    home.clock.now += 1
    assert (await answer(two, ask(max_tokens=2))).content == "ab"
    assert home.diary[4:] == ["close one", "load two"]
    assert home.most_bytes <= 10 * GB


async def test_requests_wait_while_another_drains(make: Callable[..., Home], ask: Ask) -> None:
    """A busy model ends what it has, takes nothing new, and goes; those who came meanwhile have it back later."""
    home = make(6 * GB, min_stay=5)
    one, two = home.engine("one"), home.engine("two")
    await one.start()
    home.gates["one"].clear()
    running = asyncio.create_task(answer(one, ask(max_tokens=5)))
    await until(lambda: one.statistics().running == 1)
    home.clock.now += 6
    wanted = asyncio.create_task(answer(two, ask(max_tokens=3)))
    await until(lambda: home.of("two").waiting == 1)
    later = asyncio.create_task(answer(one, ask(max_tokens=2)))
    await until(lambda: home.of("one").waiting == 1)
    assert not two.statistics().steps
    home.gates["one"].set()
    assert (await running).content == "abcde"
    assert (await wanted).content == "abc"
    home.clock.now += 6
    home.host._device._replan()
    assert (await later).content == "ab"
    assert home.diary == ["load one", "close one", "load two", "close two", "load one"]


async def test_a_minimum_stay_prevents_thrashing(make: Callable[..., Home], ask: Ask) -> None:
    """Two models in demand that do not fit together take turns of the minimum stay, not of one request."""
    home = make(6 * GB, min_stay=10, clock=SystemClock())
    one, two = home.engine("one"), home.engine("two")
    first = await asyncio.gather(*(answer(one, ask(max_tokens=2)) for _ in range(20)))
    wanted = asyncio.create_task(answer(two, ask(max_tokens=2)))
    await until(lambda: home.of("two").waiting == 1)
    more = [await answer(one, ask(max_tokens=2)) for _ in range(20)]
    assert {response.content for response in [*first, *more]} == {"ab"}
    assert home.diary == ["load one"]
    wanted.cancel()
    await asyncio.wait([wanted])
    assert home.of("two").waiting == 0


async def test_an_idle_one_goes_before_its_stay_is_over(make: Callable[..., Home], ask: Ask) -> None:
    """Where nobody comes for a tenth of the minimum stay, nobody is kept waiting for the rest of it."""
    home = make(6 * GB, min_stay=0.2, clock=SystemClock())
    one, two = home.engine("one"), home.engine("two")
    await answer(one, ask(max_tokens=1))
    assert (await answer(two, ask(max_tokens=1))).content == "a"
    assert home.diary == ["load one", "close one", "load two"]


async def test_who_needs_room_is_not_overtaken(make: Callable[..., Home], ask: Ask) -> None:
    """A large model that waits for room gets it before a small one that came later and would fit sooner."""
    home = make(10 * GB, min_stay=0)
    busy, large, small = home.engine("busy", 4 * GB), home.engine("large", 9 * GB), home.engine("small", 1 * GB)
    await busy.start()
    home.gates["busy"].clear()
    running = asyncio.create_task(answer(busy, ask(max_tokens=3)))
    await until(lambda: busy.statistics().running == 1)
    home.gates["large"].clear()
    first = asyncio.create_task(answer(large, ask(max_tokens=1)))
    await until(lambda: home.of("large").waiting == 1)
    second = asyncio.create_task(answer(small, ask(max_tokens=1)))
    await until(lambda: home.of("small").waiting == 1)
    home.gates["busy"].set()
    await running
    home.gates["large"].set()
    await asyncio.gather(first, second)
    assert home.diary.index("load large") < home.diary.index("load small")


async def test_giving_up_while_waiting(make: Callable[..., Home], ask: Ask) -> None:
    """When the one that waits for room gives up, the other one takes requests again as if nothing had been."""
    home = make(6 * GB, min_stay=0)
    one, two = home.engine("one"), home.engine("two")
    await one.start()
    home.gates["one"].clear()
    running = asyncio.create_task(answer(one, ask(max_tokens=3)))
    await until(lambda: one.statistics().running == 1)
    impatient = asyncio.create_task(answer(two, ask(max_tokens=1)))
    await until(lambda: home.of("two").waiting == 1)
    later = asyncio.create_task(answer(one, ask(max_tokens=1)))
    await until(lambda: home.of("one").waiting == 1)
    impatient.cancel()
    await asyncio.wait([impatient])
    assert home.of("one").waiting == 0
    home.gates["one"].set()
    await asyncio.gather(running, later)
    assert home.diary == ["load one"]


async def test_one_device_one_thread(make: Callable[..., Home], ask: Ask) -> None:
    """However many engines are in place, one of them loads, steps or closes at a time."""
    home = make(10 * GB, min_stay=0)
    engines = [home.engine(name, 3 * GB) for name in ("one", "two", "three", "four", "five")]
    for _ in range(3):
        await asyncio.gather(*(answer(engine, ask(max_tokens=5)) for engine in engines * 4))
    assert home.at_once == 1
    assert home.most_bytes <= 10 * GB


async def test_side_by_side_when_told_to(make: Callable[..., Home], ask: Ask) -> None:
    """With parallel=True a step of one does not wait for a step of the other."""
    home = make(parallel=True)
    one, two = home.engine("one"), home.engine("two")
    await asyncio.gather(one.start(), two.start())
    home.gates["one"].clear()
    stuck = asyncio.create_task(answer(one, ask(max_tokens=1)))
    await until(lambda: one.statistics().running == 1)
    assert (await answer(two, ask(max_tokens=3))).content == "abc"
    home.gates["one"].set()
    await stuck


async def test_what_is_too_large_for_the_host(make: Callable[..., Home], ask: Ask) -> None:
    """A model that takes more than there is says so in numbers, and the others are served as before."""
    home = make()
    one, huge = home.engine("one"), home.engine("huge", 11 * GB)
    await answer(one, ask(max_tokens=1))
    home.clock.now += 100
    with pytest.raises(ModelLoadError, match=r"'huge' takes 11 GB .* has 10 GB"):
        await answer(huge, ask(max_tokens=1))
    assert (await answer(one, ask(max_tokens=1))).content == "a"
    assert not home.of("huge").resident


async def test_an_estimate_that_was_wrong(make: Callable[..., Home], ask: Ask) -> None:
    """What a model really takes is known once it is loaded, and from then on counts."""
    home = make(10 * GB, min_stay=0)
    one, two = home.engine("one", 4 * GB), home.engine("two", 7 * GB)
    home.host._device.residents()[1].size = 1 * GB
    await answer(one, ask(max_tokens=1))
    await answer(two, ask(max_tokens=1))
    assert home.of("two").bytes == 7 * GB
    await until(lambda: home.diary[2:] == ["close one"])
    home.clock.now += 1
    await answer(one, ask(max_tokens=1))
    assert home.diary[-2:] == ["close two", "load one"]


async def test_a_model_that_cannot_be_loaded_holds_no_memory(make: Callable[..., Home], ask: Ask) -> None:
    """After a failure to load the memory is there for others, and the next request tries again."""
    home = make(6 * GB, min_stay=0)

    def broken() -> Runner:
        raise OSError("disk on fire")

    bad = Engine(broken, model_id="bad", host=home.host)
    good = home.engine("good")
    results = await asyncio.gather(*(answer(bad, ask()) for _ in range(5)), return_exceptions=True)
    assert {type(result) for result in results} == {ModelLoadError}
    assert home.host.statistics().used == 0
    assert (await answer(good, ask(max_tokens=1))).content == "a"
    await bad.aclose()


async def test_a_runtime_that_runs_by_itself(make: Callable[..., Home], scripted: Any, ask: Ask) -> None:
    """It cannot take turns, and says what to do."""
    home = make()

    class Waiting(scripted):  # type: ignore[misc]  # a class from a fixture
        waits = True

    engine = Engine(lambda: Waiting(), model_id="vllm", host=home.host)
    with pytest.raises(ConfigurationError, match=r"EngineHost\(parallel=True\)"):
        await answer(engine, ask())
    await engine.aclose()


async def test_closing_while_requests_wait(make: Callable[..., Home], ask: Ask) -> None:
    """Closing the host fails everybody with a ClosedError: who runs, who waits for room, and who comes later."""
    home = make(6 * GB, min_stay=1000)
    one, two = home.engine("one"), home.engine("two")
    await one.start()
    home.gates["one"].clear()
    tasks = [asyncio.create_task(answer(one, ask()))]
    await until(lambda: one.statistics().running == 1)
    tasks += [asyncio.create_task(answer(two, ask())) for _ in range(3)]
    await until(lambda: home.of("two").waiting == 3)
    closing = asyncio.create_task(home.host.aclose())
    await asyncio.sleep(0)
    home.gates["one"].set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    await closing
    assert {type(result) for result in results} == {ClosedError}
    with pytest.raises(ClosedError):
        await answer(two, ask())
    with pytest.raises(ClosedError):
        home.engine("late")


async def test_closing_one_model(make: Callable[..., Home], ask: Ask) -> None:
    """A model that is closed leaves its place to those who wait."""
    home = make(6 * GB, min_stay=1000)
    one, two = home.engine("one"), home.engine("two")
    await answer(one, ask(max_tokens=1))
    task = asyncio.create_task(answer(two, ask(max_tokens=1)))
    await until(lambda: home.of("two").waiting == 1)
    await one.aclose()
    assert (await task).content == "a"
    assert [engine.model_id for engine in home.host.statistics().engines] == ["two"]


async def test_an_engine_that_dies_keeps_its_place(make: Callable[..., Home], ask: Ask, scripted: Any) -> None:
    """A death at work is none of the host's business: the next request has the model loaded again in its place."""
    home = make(10 * GB)
    deaths = iter(range(1))

    class Mortal(scripted):  # type: ignore[misc]  # a class from a fixture
        def step(self) -> Any:
            if next(deaths, None) is not None:
                raise SystemExit("dead")
            return super().step()

    engine = Engine(lambda: Mortal(), model_id="mortal", host=home.host)
    with pytest.raises(AsyncModelsError, match="dead"):
        await answer(engine, ask())
    assert (await answer(engine, ask(max_tokens=1))).content == "a"
    await engine.aclose()


async def test_many_agents_two_models_and_little_room(make: Callable[..., Home], ask: Ask) -> None:
    """Requests for four models that never fit together, half of them cancelled: all end, nothing is left."""
    home = make(8 * GB, min_stay=0.001, clock=SystemClock())
    engines = [home.engine(name, 3 * GB, max_batch_size=4, max_queued=8) for name in ("one", "two", "three", "four")]
    dice = random.Random(3)
    tasks = []
    for _ in range(200):
        tasks.append(asyncio.create_task(answer(dice.choice(engines), ask(max_tokens=dice.randint(1, 6)))))
        for _ in range(dice.randint(0, 4)):
            await asyncio.sleep(0)
        if dice.random() < 0.5:
            dice.choice(tasks).cancel()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
    assert all(isinstance(result, Response | asyncio.CancelledError) for result in results)
    assert any(isinstance(result, Response) for result in results)
    await until(lambda: all(engine.users == engine.waiting == 0 for engine in home.host.statistics().engines))
    assert home.most_bytes <= 8 * GB
    assert home.at_once == 1


def test_two_event_loops_share_a_host(scripted: Any, ask: Ask) -> None:
    """Threads with event loops of their own ask for models that do not fit together, and all are answered."""
    home = Home(scripted, EngineHost(6 * GB, min_stay=0))
    engines = [home.engine("one"), home.engine("two")]
    contents: list[str | None] = []

    def work(engine: Engine) -> None:
        async def many() -> None:
            for _ in range(3):
                responses = await asyncio.gather(*(answer(engine, ask(max_tokens=3)) for _ in range(5)))
                contents.extend(response.content for response in responses)

        asyncio.run(many())

    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(home.host.aclose())
    assert contents == ["abc"] * 30
    assert home.loaded == set()


def test_turns_go_round() -> None:
    """Whoever has waited longest has the next turn, also when who had the last one asks again at once."""
    turns, order = Turns(), []
    first = threading.Event()

    def work(name: str) -> None:
        for _ in range(50):
            with turns:
                order.append(name)
                first.wait(0.0001)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    both = order[order.index("b") : len(order) - order[::-1].index("a")]
    assert all(one != other for one, other in pairwise(both)) or len(both) < 4


@pytest.mark.parametrize(
    "settings",
    [
        {"memory": 0},
        {"memory": "8GB"},
        {"memory": float("inf")},
        {"memory": True},
        {"memory": 10, "kv_memory": 10},
        {"memory": 10, "kv_memory": 0},
        {"memory": 10, "min_stay": -1},
        {"memory": 10, "parallel": 1},
    ],
    ids=str,
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    """One sentence says which setting is at fault."""
    with pytest.raises(ConfigurationError, match=f"^{list(settings)[-1]} must be"):
        EngineHost(**settings)


def test_what_a_model_weighs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripted: Any) -> None:
    """Its files say it, in a folder or in Hugging Face's cache; else it is taken for everything."""
    folder = tmp_path / "hub" / "models--org--name" / "snapshots" / "1"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"0" * 700)
    (folder / "tokenizer.json").write_bytes(b"0" * 50)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    host = EngineHost(10_000, kv_memory=100)
    engines = [Engine(lambda: scripted(), model_id=name, host=host) for name in (str(folder), "org/name", "org/other")]
    assert [engine.bytes for engine in host.statistics().engines] == [800, 800, 10_000]
    assert repr(host) == "<EngineHost 0 of 1e-05 GB>"
    for engine in engines:
        engine.abandon()
    assert host.statistics().engines == ()
