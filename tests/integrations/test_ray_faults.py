"""What goes wrong in a run on Ray: workers that die, items that kill them, runs that are left; and limits in Redis."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from asyncmodels.batch.reading import read_journal
from asyncmodels.callable import CallableModel
from asyncmodels.errors import ClosedError, RunError, WorkerDiedError
from asyncmodels.policies.rate_limit import RateLimit
from asyncmodels.remote.openai import OpenAIModel
from tests.batch.killing import Seen, counting_server
from tests.server.handle import Server
from tests.server.script import Answer

ray = pytest.importorskip("ray", reason="Ray is not installed")

from asyncmodels.integrations.ray import RayExecutor  # noqa: E402  # it needs the package above
from tests.integrations.ray_cluster import Cluster, are_gone, running_cluster  # noqa: E402  # the same

pytestmark = pytest.mark.cluster

KEY = "sk-a-very-secret-key"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def counted_server() -> Iterator[tuple[str, Seen]]:
    """A model that answers each prompt with ``answer to`` it, after 20 ms; its URL and what it has seen."""
    with counting_server() as told:
        yield told


def slow() -> CallableModel:
    """Answers with the number of the process, and never where the prompt is ``wait``."""

    async def answer(messages: Any) -> str:
        import asyncio
        import os

        if messages[-1]["content"] == "wait":
            await asyncio.sleep(1000)
        return str(os.getpid())

    return CallableModel(answer)


async def test_a_killed_worker_costs_no_item(tmp_path: Path, counted_server: tuple[str, Seen]) -> None:
    """Each item is in the journal once with its own answer; only what the dead worker held is asked again, once."""
    count, in_flight = 300, 20
    executor = RayExecutor(workers=2, in_flight=in_flight)
    inputs = [{"id": str(number), "prompt": str(number)} for number in range(count)]
    journal = tmp_path / "run.sqlite"
    seen_items, killed = [], 0
    url, seen = counted_server
    async with OpenAIModel("m", api_base=url, api_key=KEY) as model, executor:
        async for item in model.map(inputs, journal=journal, executor=executor, progress=False):
            seen_items.append(item)
            counted = executor.statistics()
            assert counted is not None
            if not killed and len(seen_items) > 50 and counted.workers[0].in_flight:
                killed = counted.workers[0].pid
                os.kill(killed, signal.SIGKILL)
        counted = executor.statistics()
    assert counted is not None
    assert counted.died == 1
    assert 0 < counted.sent_again <= in_flight
    assert killed not in [worker.pid for worker in counted.workers]
    assert [item.index for item in seen_items if not item.ok] == []
    assert sorted(int(item.id) for item in seen_items) == list(range(count))
    records = {record.id: record for record in read_journal(journal).records()}
    assert len(records) == count
    assert all(f"answer to {id}" in str(record.answer) for id, record in records.items())
    assert count <= seen.prompts.total() <= count + counted.sent_again
    assert max(seen.prompts.values()) <= 2


async def test_an_item_that_kills_its_workers_is_sent_twice() -> None:
    """Then it is an error of that item, and the others are answered by who comes after them."""

    def answer(messages: Any) -> str:
        import os

        if messages[-1]["content"] == "poison":
            os._exit(1)
        return "fine"

    inputs = ["a", "b", "poison", "c", "d"]
    async with RayExecutor(workers=1, in_flight=1) as executor:
        items = await CallableModel(answer).map(inputs, executor=executor, progress=False).results()
        counted = executor.statistics()
    assert [item.ok for item in items] == [True, True, False, True, True]
    assert isinstance(items[2].error, WorkerDiedError)
    assert "and so did the one that it was sent to again" in str(items[2].error)
    assert counted is not None
    assert (counted.died, counted.sent_again) == (2, 1)


async def test_no_worker_left_is_the_end_of_the_run(tmp_path: Path) -> None:
    """A worker that dies and has no successor in time ends the run, with what was answered in the journal."""
    marker = tmp_path / "made"

    def once() -> CallableModel:
        import os
        from pathlib import Path

        with Path(marker).open("a") as file:
            file.write("x")
        if len(Path(marker).read_text()) > 1:
            os._exit(1)
        return slow()

    journal = tmp_path / "run.jsonl"
    executor = RayExecutor(workers=1, in_flight=2, model=once)
    items = aiter(slow().map(["a", "wait"], journal=journal, executor=executor, progress=False))
    os.kill(int(str((await anext(items)).unwrap())), signal.SIGKILL)
    with pytest.raises(RunError, match="has no worker any more"):
        await anext(items)
    assert [record.id for record in read_journal(journal).records() if record.ok] == ["0"]


async def test_cancel_ends_what_the_workers_do(server: Server) -> None:
    """Reading ends, no request stays open at the provider, and the processes go."""
    place = server.script(Answer(delay=60))
    executor = RayExecutor(workers=2, in_flight=5)
    async with OpenAIModel("m", api_base=f"{place.url}/v1", api_key=KEY) as model:
        run = model.map([str(n) for n in range(100)], executor=executor, progress=False)
        reading = asyncio.create_task(run.results())
        await place.until(in_progress=10)
        counted = executor.statistics()
        assert counted is not None
        run.cancel()
        assert await reading == []
    seen = await place.until(in_progress=0, open=0)
    assert len(seen.requests) == 10
    assert are_gone(*(worker.pid for worker in counted.workers))


async def test_an_error_of_the_reader_ends_the_workers() -> None:
    """What is raised where results are read leaves nothing behind."""
    pids = []

    async def read() -> None:
        async with slow().map(["a", *["wait"] * 10], executor=RayExecutor(workers=1), progress=False) as run:
            async for item in run:
                pids.append(int(str(item.unwrap())))
                raise LookupError("of the reader")

    with pytest.raises(LookupError, match="of the reader"):
        await read()
    assert are_gone(*pids)


async def test_cancelling_the_task_that_reads() -> None:
    """A run that is still starting is left at once, and what Ray was asked for is taken back."""
    run = slow().map(["wait"], executor=RayExecutor(workers=1, num_gpus=1), progress=False)
    reading = asyncio.create_task(run.results())
    await asyncio.sleep(0.5)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await run.aclose()
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def test_closing_the_executor_under_a_run() -> None:
    """Its items can no longer be answered, which ends it."""
    executor = RayExecutor(workers=1)
    items = aiter(slow().map(["a", "wait"], executor=executor, progress=False))
    await anext(items)
    await executor.aclose()
    with pytest.raises(RunError, match="have been closed"):
        await anext(items)


async def test_a_model_that_is_closed_on_its_worker() -> None:
    """The error of one request there is that of its item, also where it is one of a model that has been closed."""

    def closed() -> CallableModel:
        import asyncio
        import threading

        model = slow()
        closing = threading.Thread(target=lambda: asyncio.run(model.aclose()))
        closing.start()
        closing.join()
        return model

    items = await slow().map(["a", "b"], executor=RayExecutor(workers=1, model=closed), progress=False).results()
    assert [type(item.error) for item in items] == [ClosedError, ClosedError]


SCRIPT = """
import asyncio, sys
from asyncmodels import CallableModel
from asyncmodels.integrations.ray import RayExecutor

async def answer(messages):
    if messages[-1]["content"] == "wait":
        await asyncio.sleep(1000)
    import os
    return str(os.getpid())

async def main():
    model = CallableModel(answer)
    async for item in model.map(["a", *["wait"] * 50], executor=RayExecutor(workers=1), progress=False):
        print(item.unwrap(), flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_program_that_is_interrupted_leaves_no_worker(cluster: Cluster, number: signal.Signals) -> None:
    """Ctrl-C ends the remote work, and so does the death of the program, which had joined the cluster by itself."""
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        child.send_signal(number)
        _, said = child.communicate(timeout=60)
    assert child.returncode in (-number, 130, 1)
    if number == signal.SIGINT:
        assert said.rstrip().endswith("KeyboardInterrupt")
    assert are_gone(pid)


MISSING = """
import sys
sys.modules["ray"] = None  # as if it were not installed
import asyncmodels
try:
    import asyncmodels.integrations.ray
except asyncmodels.MissingExtraError as error:
    print(error)
"""


def test_a_missing_package_says_what_to_install() -> None:
    """Importing the integration without Ray names the command that mends it."""
    ended = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "RayExecutor needs the package 'ray': pip install \"asyncmodels[ray]\"\n"


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("redis", reason="the redis package is not installed")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path), "--save", ""]
    with subprocess.Popen([program, *options], stdout=subprocess.DEVNULL) as process:
        for _ in range(500):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}/0#ray"
        process.kill()


async def test_workers_share_a_limit_through_redis(redis_url: str, counted_server: tuple[str, Seen]) -> None:
    """Both ask, and both together no faster than the one limit allows."""
    per_second, count = 40.0, 100
    began, times = time.monotonic(), []
    limit = partial(RateLimit, requests_per_minute=60 * per_second, shared=redis_url)
    executor = RayExecutor(workers=2)
    url, seen = counted_server
    async with OpenAIModel("m", api_base=url, api_key=KEY, policies=[limit]) as model, executor:
        async for item in model.map([str(n) for n in range(count)], executor=executor, progress=False):
            item.unwrap()
            times.append(time.monotonic() - began)
        counted = executor.statistics()
    assert counted is not None
    assert all(worker.answered > 10 for worker in counted.workers)
    assert seen.prompts.total() == count
    assert times[-1] >= (count - 5) / per_second
