"""vLLM's processes: they end with the engine, with the interpreter, and never leave anybody waiting."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent

import psutil

from asyncmodels.errors import EngineDeadError
from asyncmodels.local.runner import RunnerLostError
from asyncmodels.local.vllm import VLLMModel
from asyncmodels.local.vllm_watch import watch
from asyncmodels.types import Response
from tests.local.on_vllm.kept import SETTINGS, tiny_folder

PATIENCE = 60.0


def engine_processes(parent: psutil.Process) -> list[psutil.Process]:
    return [process for process in parent.children(recursive=True) if "VLLM" in process.name()]


async def test_when_the_engine_is_killed() -> None:
    """Everybody who is with it fails at once with the cause, its other processes go, and the next call gets another."""
    me = psutil.Process()
    before = set(engine_processes(me))
    async with VLLMModel(str(tiny_folder()), SETTINGS, max_batch_size=4) as model:
        family = set(engine_processes(me)) - before
        (core,) = [process for process in family if "EngineCore" in process.name()]
        tasks = [asyncio.create_task(model.generate(f"{n}", extra={"ignore_eos": True})) for n in range(10)]
        async with model.stream("hello", extra={"ignore_eos": True}) as stream:
            async for _ in stream:
                break
            core.send_signal(signal.SIGKILL)
            results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE)
        for result in results:
            assert isinstance(result, EngineDeadError | Response)
            if isinstance(result, EngineDeadError):
                assert isinstance(result.__cause__, RunnerLostError)
                assert type(result.__cause__.__cause__).__name__ == "EngineDeadError"
        assert any(isinstance(result, EngineDeadError) for result in results)
        assert (await model.generate("hello", max_tokens=5)).content
        assert model.statistics().links["VLLMBackend"].restarts == 1
        _, alive = await asyncio.to_thread(psutil.wait_procs, family, PATIENCE)
        assert alive == []
        family = set(engine_processes(me)) - before
        assert len(family) == 2
    assert [process for process in family if process.is_running()] == []


def test_a_script_that_just_ends(tmp_path: Path) -> None:
    """Two loops, one after the other, then the end of the interpreter without a word: no process stays, none hangs."""
    script = tmp_path / "just_ends.py"
    script.write_text(
        dedent(
            f"""
            import asyncio, psutil
            from asyncmodels.local.vllm import VLLMModel

            model = VLLMModel({str(tiny_folder())!r}, {dict(SETTINGS)!r}, max_batch_size=4)

            async def ask():
                return (await model.generate("hello", max_tokens=5, temperature=0)).content

            if __name__ == "__main__":
                assert asyncio.run(ask()) == asyncio.run(ask())
                print(*(process.pid for process in psutil.Process().children(recursive=True)))
            """
        )
    )
    done = run(script)
    assert done.returncode == 0, done.stderr
    pids = [int(word) for word in done.stdout.split()[-3:]]
    assert pids
    alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert psutil.wait_procs(alive, PATIENCE)[1] == []


def test_a_script_without_a_guard(tmp_path: Path) -> None:
    """A script that starts the model wherever it is imported is told what is wrong, although it would try for ever."""
    script = tmp_path / "unguarded.py"
    script.write_text(
        dedent(
            f"""
            import asyncio
            from asyncmodels.errors import ModelLoadError
            from asyncmodels.local.vllm import VLLMModel

            async def main():
                await VLLMModel({str(tiny_folder())!r}, {dict(SETTINGS)!r}).load()

            while True:
                try:
                    asyncio.run(main())
                except ModelLoadError as error:
                    if __name__ == "__main__":
                        print(error)
                        break
            """
        )
    )
    done = run(script)
    assert done.returncode == 0, done.stderr
    assert "its process ended while it started" in done.stdout
    assert "runs the main script again" in done.stderr
    assert 'if __name__ == "__main__":' in done.stderr


def run(script: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=environment(),
    )


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def test_who_started_an_engine_is_watched(tmp_path: Path) -> None:
    """A process of vLLM's ends when what started it was killed; other children of that, and of others, do not watch."""
    script = tmp_path / "parent.py"
    script.write_text(
        dedent(
            """
            import multiprocessing, os, subprocess, sys, time

            def child(pipe):
                from asyncmodels.local.vllm_watch import watch
                watch()
                pipe.send(os.getpid())
                time.sleep(500)

            if __name__ == "__main__":
                context = multiprocessing.get_context("spawn")
                for starter in (os.getpid(), 1):
                    os.environ["ASYNCMODELS_VLLM_STARTED_BY"] = str(starter)
                    here, there = context.Pipe()
                    context.Process(target=child, args=(there,)).start()
                    print(here.recv(), flush=True)
                os.environ["ASYNCMODELS_VLLM_STARTED_BY"] = str(os.getpid())
                code = "from asyncmodels.local.vllm_watch import watch; import os, time; watch(); time.sleep(500)"
                print(subprocess.Popen([sys.executable, "-c", code]).pid, flush=True)
                time.sleep(500)
            """
        )
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment())
    assert parent.stdout is not None
    mine, *others = (psutil.Process(int(parent.stdout.readline())) for _ in range(3))
    try:
        parent.kill()
        parent.wait()
        assert psutil.wait_procs([mine], PATIENCE)[1] == []
        assert all(other.is_running() for other in others)
    finally:
        parent.stdout.close()
        for other in others:
            other.kill()


def test_vllm_calls_the_watch() -> None:
    """The entry point by which vLLM finds the watch leads to it."""
    (point,) = (point for point in entry_points(group="vllm.general_plugins") if point.name == "asyncmodels")
    assert point.load() is watch
