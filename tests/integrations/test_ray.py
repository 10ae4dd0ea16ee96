"""Runs on the workers of a real Ray cluster on this machine: answers, errors, refusals, and that nothing is left."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from asyncmodels.batch.reading import read_journal
from asyncmodels.callable import CallableModel
from asyncmodels.errors import (
    AsyncModelsError,
    ConfigurationError,
    EventLoopError,
    InvalidRequestError,
    MissingKeyError,
    RateLimitError,
)
from asyncmodels.model import Model
from asyncmodels.policies.budget import Budget
from asyncmodels.policies.rate_limit import RateLimit
from asyncmodels.remote.openai import OpenAIModel
from tests.server.handle import Server

ray = pytest.importorskip("ray", reason="Ray is not installed")

from asyncmodels.integrations.ray import RayExecutor  # noqa: E402  # it needs the package above
from tests.integrations.ray_cluster import Cluster, are_gone, running_cluster  # noqa: E402  # the same

pytestmark = pytest.mark.cluster

KEY = "sk-a-very-secret-key"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


def pids(executor: RayExecutor) -> list[int]:
    counted = executor.statistics()
    return [] if counted is None else [worker.pid for worker in counted.workers]


def echo() -> CallableModel:
    """Answers with the prompt and the number of the process that answers. Made inside, so that it travels whole."""

    def answer(messages: Any) -> str:
        import os

        return f"{messages[-1]['content']} {os.getpid()}"

    return CallableModel(answer, model_id="echo")


# -- what comes back --------------------------------------------------------------------------------------------------


async def test_all_workers_answer_and_end_with_the_run() -> None:
    """Each input has its own answer, both workers give some, none of it happens here, and then they are gone."""
    inputs = [{"id": f"i{number}", "prompt": f"p{number}"} for number in range(50)]
    run = echo().map(inputs, executor=RayExecutor(workers=2), progress=False)
    items = await run.results()
    said = [str(item.unwrap()).split() for item in items]
    assert [(item.index, item.id, prompt) for item, (prompt, _) in zip(items, said, strict=True)] == [
        (number, f"i{number}", f"p{number}") for number in range(50)
    ]
    workers = {int(pid) for _, pid in said}
    assert len(workers) == 2
    assert os.getpid() not in workers
    counted = run.statistics()
    assert (counted.read, counted.succeeded, counted.in_flight) == (50, 50, 0)
    assert are_gone(*workers)


def test_the_sync_face_and_order() -> None:
    """Without an event loop of one's own, and in the order of the input."""
    with echo().sync.map((f"p{n}" for n in range(40)), ordered=True, executor=RayExecutor(2, in_flight=3)) as run:
        assert [str(item.unwrap()).split()[0] for item in run] == [f"p{n}" for n in range(40)]


async def test_workers_that_are_kept_serve_run_after_run() -> None:
    """While the executor is entered its workers stay, also after a run that was left, and they end when it is left."""
    model = echo()
    async with RayExecutor(workers=1) as executor:
        await model.map(["a"], executor=executor).results()
        (pid,) = pids(executor)
        async with model.map([str(n) for n in range(1000)], executor=executor) as run:
            async for _ in run:
                break
        assert pids(executor) == [pid]
        (item,) = await model.map(["b"], executor=executor).results()
        assert str(item.unwrap()) == f"b {pid}"
        other = [item async for item in echo().map(["c"], executor=executor)]
        assert str(other[0].unwrap()) != f"c {pid}"
        assert are_gone(pid)
        left = pids(executor)
    assert are_gone(*left)


async def test_two_runs_at_once_are_refused() -> None:
    """An executor serves one run at a time."""
    model, executor = echo(), RayExecutor(workers=1)
    async with model.map(["a", "b"], executor=executor) as run:
        async for _ in run:
            with pytest.raises(ConfigurationError, match="serves a run already"):
                await model.map(["c"], executor=executor).results()


async def test_errors_are_values_and_keep_what_they_say() -> None:
    """An error is the item's, of its own class, with its fields and its cause; what cannot travel is told in words."""

    def answer(messages: Any) -> str:
        text = messages[-1]["content"]
        if text == "limited":
            raise RateLimitError("slow down", retry_after=3.0, status=429) from ValueError("because")
        if text == "odd":

            class OddError(Exception):
                def __init__(self, first: str, second: object) -> None:
                    super().__init__(f"{first} {second}")

            raise OddError("so", "odd")
        return "fine"

    items = await CallableModel(answer).map(["limited", "odd", "x"], executor=RayExecutor(workers=1)).results()
    first, second, third = items
    assert isinstance(first.error, RateLimitError)
    assert (first.error.retry_after, first.error.status) == (3.0, 429)
    assert isinstance(first.error.__cause__, ValueError)
    assert isinstance(second.error, AsyncModelsError)
    assert str(second.error) == "OddError: so odd"
    assert str(third.unwrap()) == "fine"


@dataclass
class Capital:
    name: str


async def test_answers_are_parsed_with_the_classes_of_this_process(tmp_path: Path) -> None:
    """``parsed`` is an instance of the very class; an image is read here, where its file is."""
    picture = tmp_path / "dot.png"
    picture.write_bytes(
        bytes.fromhex(
            "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc00000"
            "0301010018dd8db00000000049454e44ae426082"
        )
    )

    def answer(messages: Any) -> str:
        (part,) = messages[-1]["content"]
        return f'{{"name": "{part["image_url"]["url"][:14]}"}}'

    inputs = [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": path}]}]} for path in (picture, "no")
    ]
    model = CallableModel(answer)
    first, second = await model.map(inputs, response_format=Capital, executor=RayExecutor(workers=1)).results()
    assert first.unwrap().parsed == Capital("data:image/png")
    assert isinstance(second.error, InvalidRequestError)


class _Locked:
    """Cannot be sent."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class _Unreadable:
    """Can be sent, and not be read."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


async def test_what_cannot_travel_is_an_error_of_its_item() -> None:
    """A request that cannot be sent, or not be read, says so, and those that travel with it are answered."""
    inputs: list[Any] = [{"prompt": f"p{number}"} for number in range(20)]
    inputs[3] = {"prompt": "locked", "metadata": {"it": _Locked()}}
    inputs[7] = {"prompt": "unreadable", "metadata": {"it": _Unreadable()}}
    inputs[8] = {"prompt": "unreadable", "metadata": {"it": _Unreadable()}}
    items = await echo().map(inputs, executor=RayExecutor(workers=1)).results()
    assert [item.index for item in items if not item.ok] == [3, 7, 8]
    assert isinstance(items[3].error, InvalidRequestError)
    assert "cannot be sent to another process (TypeError: cannot pickle '_thread.lock' object)" in str(items[3].error)
    assert "cannot be read on the worker (ValueError: invalid literal" in str(items[7].error)


# -- what is kept -----------------------------------------------------------------------------------------------------


async def test_a_journal_is_kept_here_and_what_it_has_starts_no_worker(tmp_path: Path) -> None:
    """The second run finds all answers in the journal and asks Ray for nothing."""
    journal = tmp_path / "run.sqlite"
    inputs = [str(number) for number in range(30)]
    await echo().map(inputs, journal=journal, executor=RayExecutor(workers=2)).results()
    assert sum(record.ok for record in read_journal(journal).records()) == 30
    async with RayExecutor(workers=2) as executor:
        items = await echo().map(inputs, journal=journal, executor=executor).results()
        assert all(item.reused for item in items)
        counted = executor.statistics()
        assert counted is not None
        assert (counted.workers, counted.starting) == ((), 0)


async def test_keys_stand_in_nothing_that_ray_writes(cluster: Cluster, server: Server) -> None:
    """The key reaches the provider, and neither the logs of Ray nor what the executor says of itself have it."""
    place = server.script()
    executor = RayExecutor(workers=1, runtime_env={"env_vars": {"SOME_TOKEN": "another-secret"}})
    async with OpenAIModel("m", api_base=f"{place.url}/v1", api_key=KEY) as model:
        (item,) = await model.map(["hello"], executor=executor).results()
    assert item.unwrap().raw["choices"]
    assert place.seen().requests[0].header("authorization") == f"Bearer {KEY}"
    assert [path for path, text in cluster.logs() if KEY in text] == []
    assert "secret" not in repr(executor)


async def test_progress_counts_for_all_workers(server: Server) -> None:
    """The limit that is shown is that of all workers together, and so is what they retried."""
    place = server.script()
    views: list[Any] = []
    async with OpenAIModel("m", api_base=f"{place.url}/v1", api_key=KEY, max_concurrency=7) as model:
        await model.map([str(n) for n in range(60)], executor=RayExecutor(workers=2), progress=views.append).results()
    assert views[-1].limit == 14
    assert views[-1].statistics.succeeded == 60


async def test_a_reader_who_stops_stops_the_workers() -> None:
    """Inputs are taken up as results are read, whatever there is."""
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield str(taken)

    async with echo().map(endless(), executor=RayExecutor(workers=2, in_flight=4)) as run:
        items = aiter(run)
        for _ in range(20):
            await anext(items)
        await asyncio.sleep(0.3)
        first = taken
        assert first <= 20 + 2 * 8 + 2
        await asyncio.sleep(0.1)
        assert taken == first


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"workers": 0}, "workers=...) is a whole number of at least 1, not 0"),
        ({"workers": "two"}, "workers=...) is a whole number of at least 1, not 'two'"),
        ({"workers": True}, "workers=...) is a whole number"),
        ({"workers": 2, "in_flight": 0}, "in_flight=...) is a whole number of at least 1, not 0"),
        ({"workers": 2, "num_cpus": -1}, "num_cpus=...) is a number of at least 0, not -1"),
        ({"workers": 2, "num_gpus": "1"}, "num_gpus=...) is a number of at least 0, not '1'"),
        ({"workers": 2, "num_gpus": float("nan")}, "num_gpus=...) is a number of at least 0"),
        ({"workers": 2, "resources": ["fast"]}, "resources=...) is a dict of names and amounts"),
        ({"workers": 2, "resources": {"fast": None}}, "resources['fast']=...) is a number of at least 0, not None"),
        ({"workers": 2, "runtime_env": "env.yaml"}, "runtime_env=...) is a dict, not str"),
        ({"workers": 2, "model": 3}, "model=...) is a function that makes the model"),
        ({"workers": 2, "model": ""}, "model=...) is a function that makes the model"),
        ({"workers": 2, "start_timeout": 0}, "start_timeout=...) is a number of seconds above 0, not 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], text: str) -> None:
    """Each is one sentence, where the executor is made."""
    with pytest.raises(ConfigurationError) as caught:
        RayExecutor(**settings)
    assert text in str(caught.value)


def test_what_is_no_executor() -> None:
    """map says what it takes, also to who passes the class."""
    with pytest.raises(ConfigurationError, match="takes an Executor, such as RayExecutor"):
        echo().map(["a"], executor=RayExecutor)  # type: ignore[arg-type]  # on purpose


async def test_limits_that_the_workers_would_multiply() -> None:
    """A limit of each worker's own, or a budget, is refused before anything starts; one worker may have either."""
    limited = OpenAIModel("m", api_base="http://127.0.0.1:9/v1", api_key=KEY, requests_per_minute=60)
    with pytest.raises(ConfigurationError, match="requests_per_minute would hold for each of the 2 workers"):
        await limited.map(["a"], executor=RayExecutor(workers=2)).results()
    paid = Model(CallableModel(len, partial(Budget, spending=1.0)))
    with pytest.raises(ConfigurationError, match="each of the 2 workers would spend all of it"):
        await paid.map(["a"], executor=RayExecutor(workers=2)).results()
    alone = CallableModel(lambda messages: "x", partial(RateLimit, requests_per_minute=6000))
    (item,) = await alone.map(["a"], executor=RayExecutor(workers=1)).results()
    assert str(item.unwrap()) == "x"


async def test_a_model_that_cannot_travel() -> None:
    """The argument that keeps it is named, with the way around; the same of a function that makes it."""
    async with httpx2.AsyncClient() as client:
        model = OpenAIModel("m", api_base="http://127.0.0.1:9/v1", api_key=KEY, http_client=client)
        with pytest.raises(ConfigurationError, match="The http_client of this OpenAIModel cannot be sent") as caught:
            await model.map(["a"], executor=RayExecutor(workers=1)).results()
        assert KEY not in str(caught.value)
    lock = threading.Lock()
    with pytest.raises(ConfigurationError, match="must be made inside of it"):
        await echo().map(["a"], executor=RayExecutor(workers=1, model=lambda: lock and echo())).results()


async def test_a_model_that_cannot_be_made_is_one_error_at_the_start() -> None:
    """Whatever the constructor says on the worker, also that there came no model, or that the process died."""

    def keyless() -> Model:
        raise MissingKeyError("No key was found.")

    def nothing() -> Any:
        return "a model"

    def deadly() -> Model:
        import os

        os._exit(1)

    for make, text in (
        (keyless, "cannot make the model: MissingKeyError: No key was found."),
        (nothing, "takes a function that returns a Model; this one returned str"),
        (deadly, "died while it made the model"),
        ("opnai:gpt", "did you mean 'openai'?"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            await echo().map(["a", "b"], executor=RayExecutor(workers=2, model=make)).results()
        assert text in str(caught.value)


async def test_no_place_in_the_cluster() -> None:
    """Where Ray finds no place in time the run says what was wanted and what there is."""
    executor = RayExecutor(workers=2, num_gpus=1, resources={"fast": 2}, start_timeout=0.3)
    with pytest.raises(ConfigurationError, match=r"Each needs 1 CPU, 1 GPU, 2 fast, and free .* 0 GPU, 0 fast"):
        await echo().map(["a"], executor=executor).results()


async def test_those_who_find_no_place_are_not_waited_for() -> None:
    """Of three workers two have a place, and do all of the work once the time for the third is over."""
    executor = RayExecutor(workers=3, start_timeout=15.0)
    async with executor:
        items = await echo().map([str(n) for n in range(20)], executor=executor).results()
        counted = executor.statistics()
    assert all(item.ok for item in items)
    assert counted is not None
    assert (len(counted.workers), counted.starting) == (2, 1)


async def test_an_executor_that_was_entered_on_another_loop() -> None:
    """Its workers belong to that loop, and a run elsewhere says so."""
    model = echo()
    async with RayExecutor(workers=1) as executor:
        await model.map(["a"], executor=executor).results()
        with pytest.raises(EventLoopError, match="entered on another event loop"):
            await asyncio.to_thread(lambda: model.sync.map(["b"], executor=executor).results())


@pytest.mark.model
async def test_a_local_engine_on_a_worker(tmp_path: Path) -> None:
    """The worker loads the model and answers as an engine here does; nothing is loaded here."""
    from asyncmodels.local.transformers import TransformersModel
    from tests.local.on_torch.tiny_llama import build_tiny_model

    folder = build_tiny_model(tmp_path / "model")
    settings: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    async with TransformersModel(str(folder)) as here:
        expected = [str(item.unwrap()) for item in await here.map(["one", "two"], **settings).results()]
    there = TransformersModel(str(folder))
    items = await there.map(["one", "two"], executor=RayExecutor(workers=1), **settings).results()
    assert [str(item.unwrap()) for item in items] == expected
    assert there.statistics().completed == 0
    await there.aclose()
